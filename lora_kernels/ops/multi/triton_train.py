"""``multi_lora_backward`` on Triton: several adapters trained in one batch.

The adapters are stacked into one bank (their shapes are the host's, the rows of each are on the device), so that one
launch serves all of them: a program reads the segment of its slot from the plan. h is computed again from x.
"""

import functools

import torch

from ..linear.triton_gradients import input_gradient, low_rank_of, skinny, sum_planes


def _bank(adapters, rank_dim):
    """Adapters of any ranks and dtypes in one tensor, zero beyond each one's rank."""
    ranks = [adapter.shape[rank_dim] for adapter in adapters]
    dtype = functools.reduce(torch.promote_types, [adapter.dtype for adapter in adapters])
    if len(set(ranks)) == 1 and all(adapter.dtype == dtype for adapter in adapters):
        return torch.stack(adapters)
    shape = list(adapters[0].shape)
    shape[rank_dim] = max(ranks)
    bank = adapters[0].new_zeros((len(adapters), *shape), dtype=dtype)
    for slot, (adapter, rank) in enumerate(zip(adapters, ranks, strict=True)):
        bank[slot].narrow(rank_dim, 0, rank).copy_(adapter)
    return bank


def _row_slots(row_order, segment_starts, num_rows):
    """int32 (M): the slot of each row, −1 for none."""
    places = torch.arange(num_rows, dtype=torch.int32, device=row_order.device)
    slots = torch.searchsorted(segment_starts[1:-1], places, right=True, out_int32=True) - 1
    return torch.empty_like(slots).scatter_(0, row_order[:num_rows].long(), slots)


def multi_lora_backward(
    dy, x, weight, lora_a, lora_b, slot_scalings, row_order, segment_starts, out_splits, da, db, need_x
):
    dx = x.new_empty(x.shape if need_x else (0,))
    num_slots, num_rows = len(lora_a), x.shape[0]
    if num_slots == 0:
        if need_x:
            dx.zero_() if weight is None else torch.mm(dy, weight, out=dx)
        return dx
    a_bank, b_bank = _bank(lora_a, -2), _bank(lora_b, -1)
    rank, stacked = b_bank.shape[2], a_bank.reshape(num_slots, a_bank.shape[1:-1].numel(), x.shape[1])
    rows = {"segments": (row_order, segment_starts), "num_slots": num_slots}
    slot_scalings = slot_scalings.contiguous()
    h = None
    if db:
        _, lows = skinny(x, stacked.transpose(1, 2), None, need_low=True, **rows)
        h = low_rank_of(lows, num_rows, stacked.shape[1], torch.float32)
    grads, lows = skinny(dy, b_bank, slot_scalings, right=h, need_low=need_x or bool(da), out_splits=out_splits, **rows)
    for slot, grad in enumerate(db):
        sum_planes(grad, grads[:, slot, :, : grad.shape[1]])
    if need_x or da:
        g = low_rank_of(lows, num_rows, rank, a_bank.dtype)
    if da:
        grads, _ = skinny(x, stacked.transpose(1, 2), None, right=g, need_low=False, by_rank=True, **rows)
        for slot, grad in enumerate(da):
            for index, part in enumerate(grad if grad.dim() == 3 else [grad]):
                sum_planes(part, grads[:, slot, index * rank : index * rank + part.shape[0]])
    if need_x:
        base = ((), ()) if weight is None else ((dy,), (weight,))
        row_slots = _row_slots(row_order, segment_starts, num_rows)
        input_gradient(dx, *base, g, stacked, row_slots=row_slots)
    return dx


KERNELS = {"multi_lora_backward": multi_lora_backward}
