"""Calls of the emulated kernels, and batches of several adapters with what they must give."""

import torch

from lora_kernels.ops import library as ops
from lora_kernels.ops import plan_batch
from lora_kernels.testing import make_multi


def cuda(name, *args):
    """The kernel of an op, run on the host."""
    return ops.cuda_op(name)(*args)


def multi_case(shape, slots, dtype, seed=0):
    """A case of :func:`make_multi` and its plan as the ops take it."""
    case = make_multi(*shape, slots, dtype, seed=seed)
    plan = plan_batch(case.token_slots, case.slot_ranks, num_slots=slots)
    return case, (plan.slot_ranks, plan.row_order, plan.segment_starts)


def exact_multi(case, low_rank_only=False):
    """What the case's product is in float64."""
    y = torch.zeros(case.x.shape[0], case.weight.shape[0], dtype=torch.float64)
    if not low_rank_only:
        y += case.x.double() @ case.weight.double().t() + (case.bias.double() if case.bias is not None else 0)
    for row, slot in enumerate(case.token_slots.tolist()):
        if slot >= 0:
            rank = case.slot_ranks[slot]
            h = case.x[row].double() @ case.a_bank[slot, :rank].double().t()
            y[row] += case.slot_scalings[slot].double() * (h @ case.b_bank[slot, :, :rank].double().t())
    return y
