"""What ``check`` runs of the ops that compute a product: a case yields (ours, eager, float64's) of one shape.

A shape is (rows, in_features, out_features, rank).
"""

import torch
import torch.nn.functional as F

from .. import ops
from ..ops.dispatch import use_backend
from ..ops.linear.dropout import dropout_mask, unpack_mask
from ..testing import (
    eager_lora_embedding,
    eager_lora_linear,
    eager_multi_lora_linear,
    embedding_results,
    exact_lora_linear,
    exact_multi_lora_linear,
    make_embedding,
    make_grouped,
    make_linear,
    make_multi,
)

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bf16, A and B f32": (torch.bfloat16, torch.float32),
}
NUM_SLOTS = 5


def _linear(shape, dtype, adapter_dtype, device):
    case = make_linear(*shape, dtype, adapter_dtype, device=device)
    alone = make_linear(*shape, dtype, adapter_dtype, base=False, device=device)
    for args in (case.args(), alone.args()):  # a big base would hide a wrong update
        expected = eager_lora_linear(*args), exact_lora_linear(*args)
        yield ops.lora_linear(*args), *expected
        yield ops.lora_linear(*args, out=torch.empty_like(expected[0])), *expected


def _linear_backward(shape, dtype, adapter_dtype, device, dropout_p=0.0):
    case = make_linear(*shape, dtype, adapter_dtype, device=device)
    seed, keep = torch.tensor(7, device=device), None
    if dropout_p:
        mask = dropout_mask(seed, *case.x.shape, dropout_p)
        keep = unpack_mask(mask, case.x.shape[1]).to(torch.float64) / (1 - dropout_p)
    dy = _dy(shape, dtype, device)

    def gradients(run, cast, **kwargs):
        inputs = [None if t is None else cast(t.detach()).requires_grad_() for t in case.args()[:5]]
        y = run(*inputs, case.scaling, **kwargs)
        leaves = [inputs[0], inputs[3], inputs[4]]
        return y.detach(), *torch.autograd.grad(y, leaves, cast(dy))

    ours = gradients(ops.lora_linear, torch.clone, dropout_p=dropout_p, dropout_seed=seed)
    eager = gradients(eager_lora_linear, torch.clone, keep=keep)
    exact = gradients(exact_lora_linear, torch.Tensor.double, keep=keep)
    yield from zip(ours, eager, exact, strict=True)


def _dropout_backward(shape, dtype, adapter_dtype, device):
    return _linear_backward(shape, dtype, adapter_dtype, device, dropout_p=0.25)


def _dropout_mask(shape, dtype, adapter_dtype, device):
    """The same bits on every device."""
    found = dropout_mask(torch.tensor(7, device=device), *shape[:2], 0.25)
    with use_backend("reference"):
        expected = dropout_mask(torch.tensor(7), *shape[:2], 0.25)
    yield same_bits(found.cpu(), expected)


def _add(shape, dtype, adapter_dtype, device):
    case, y = _add_case(shape, dtype, adapter_dtype, device)
    update = (case.x, torch.zeros_like(case.weight), None, case.lora_a, case.lora_b, case.scaling)
    expected = (y + eager_lora_linear(*update)).to(dtype), y.double() + exact_lora_linear(*update)
    yield ops.lora_add_(y, case.x, case.lora_a, case.lora_b, case.scaling), *expected


def _add_backward(shape, dtype, adapter_dtype, device):
    case, y = _add_case(shape, dtype, adapter_dtype, device)
    zeros, dy = torch.zeros_like(case.weight), _dy(shape, dtype, device)

    def gradients(run, cast):
        leaves = [cast(t.detach()).requires_grad_() for t in (case.x, case.lora_a, case.lora_b)]
        return torch.autograd.grad(run(cast(y), *leaves), leaves, cast(dy))

    def apart(linear):
        return lambda y, x, a, b: (y + linear(x, zeros, None, a, b, case.scaling)).to(y.dtype)

    ours = gradients(lambda y, x, a, b: ops.lora_add_(y, x, a, b, case.scaling), torch.clone)
    eager = gradients(apart(eager_lora_linear), torch.clone)
    yield from zip(ours, eager, gradients(apart(exact_lora_linear), torch.Tensor.double), strict=True)


def _add_case(shape, dtype, adapter_dtype, device):
    case = make_linear(*shape, dtype, adapter_dtype, device=device)
    return case, F.linear(case.x, case.weight, case.bias)


def _multi(shape, dtype, adapter_dtype, device):
    case = make_multi(*shape, NUM_SLOTS, dtype, adapter_dtype, device=device)
    plan = ops.plan_batch(case.token_slots, case.slot_ranks)
    banks = (case.a_bank, case.b_bank, case.slot_scalings)
    ours = ops.multi_lora_linear(case.x, case.weight, case.bias, *banks, plan)
    yield ours, eager_multi(case), exact_multi(case)


def _multi_list(shape, dtype, adapter_dtype, device):
    """A list of plain factors in place of banks."""
    case = make_multi(*shape, NUM_SLOTS, dtype, adapter_dtype, device=device)
    lora_a, lora_b = _factors(case)
    plan = ops.plan_batch(case.token_slots, num_slots=NUM_SLOTS)
    ours = ops.multi_lora_linear(case.x, case.weight, case.bias, lora_a, lora_b, case.slot_scalings, plan)
    yield ours, eager_multi(case), exact_multi(case)


def _multi_backward(shape, dtype, adapter_dtype, device):
    """The gradients of x and of every adapter's factors."""
    case = make_multi(*shape, NUM_SLOTS, dtype, adapter_dtype, device=device)
    lora_a, lora_b = _factors(case)
    plan, dy = ops.plan_batch(case.token_slots, num_slots=NUM_SLOTS), _dy(shape, dtype, device)
    slots = case.token_slots.tolist()

    def gradients(run, cast):
        leaves = [cast(t).requires_grad_() for t in (case.x, *lora_a, *lora_b)]
        y = run(leaves[0], leaves[1 : 1 + NUM_SLOTS], leaves[1 + NUM_SLOTS :])
        found = torch.autograd.grad(y, leaves, cast(dy), allow_unused=True)
        return [torch.zeros_like(leaf) if one is None else one for one, leaf in zip(found, leaves, strict=True)]

    def apart(linear):
        def run(x, lora_a, lora_b):
            weight, bias = case.weight.to(x.dtype), case.bias.to(x.dtype)

            def of_row(row, slot):
                if slot < 0:
                    return F.linear(row, weight, bias)
                return linear(row, weight, bias, lora_a[slot], lora_b[slot], case.slot_scalings[slot])

            return torch.cat([of_row(row[None], slot) for row, slot in zip(x, slots, strict=True)])

        return run

    def fused(x, lora_a, lora_b):
        return ops.multi_lora_linear(x, case.weight, case.bias, lora_a, lora_b, case.slot_scalings, plan)

    eager = gradients(apart(eager_lora_linear), torch.clone)
    exact = gradients(apart(exact_lora_linear), torch.Tensor.double)
    yield from zip(gradients(fused, torch.clone), eager, exact, strict=True)


def _factors(case):
    """Lists of each slot's factors, by live rank."""
    ranks = case.slot_ranks.tolist()
    lora_a = [case.a_bank[slot, :rank].contiguous() for slot, rank in enumerate(ranks)]
    return lora_a, [case.b_bank[slot, :, :rank].contiguous() for slot, rank in enumerate(ranks)]


def _grouped(shape, dtype, adapter_dtype, device):
    """Two projections of one input, the gradients of x and of the factors, and inference, which has its own kernels."""
    num_tokens, features, outputs, rank = shape
    sizes = (num_tokens, features, (outputs, outputs // 2), (rank, rank + 3))
    case = make_grouped(*sizes, dtype, adapter_dtype, device=device)

    def results(run, cast):
        groups = [[cast(t.detach()).requires_grad_() for t in group] for group in case.groups()]
        y = run(groups[0][0], *groups[1:])
        leaves = [*groups[0], *groups[3], *groups[4]]
        return (*y, *torch.autograd.grad(y, leaves, [torch.ones_like(part) for part in y]))

    def apart(one):
        return lambda x, *groups: [one(x, *each, s) for *each, s in zip(*groups, case.scalings, strict=True)]

    ours = results(lambda *args: ops.grouped_lora_linear(*args, case.scalings), torch.clone)
    eager = results(apart(eager_lora_linear), torch.clone)
    exact = results(apart(exact_lora_linear), torch.Tensor.double)
    yield from zip(ours, eager, exact, strict=True)
    with torch.no_grad():
        yield from zip(ops.grouped_lora_linear(*case.args()), eager, exact, strict=False)


def _shrink_expand(shape, dtype, adapter_dtype, device):
    case = make_multi(*shape, NUM_SLOTS, dtype, adapter_dtype, device=device)
    plan = ops.plan_batch(case.token_slots, case.slot_ranks)
    y = F.linear(case.x, case.weight, case.bias)
    exact = exact_multi(case) + (y.double() - F.linear(case.x.double(), case.weight.double(), case.bias.double()))
    h = ops.lora_shrink(case.x, case.a_bank, plan)
    yield ops.lora_expand_(y, h, case.b_bank, case.slot_scalings, plan), eager_multi(case), exact


def _embedding(shape, dtype, adapter_dtype, device):
    """The rows, and the gradients of the factors."""
    case = make_embedding(*shape, dtype, adapter_dtype, device=device)
    ours = embedding_results(ops.lora_embedding, case, padding_idx=2)
    expected = [embedding_results(eager_lora_embedding, case, kind, padding_idx=2) for kind in (None, torch.float64)]
    yield from zip(ours, *expected, strict=True)


def same_bits(found, expected):
    """Elements that differ, as a result of which none may."""
    wrong = (found != expected).sum().double().reshape(1)
    return wrong, torch.zeros_like(wrong), torch.zeros_like(wrong)


def _dy(shape, dtype, device):
    return make_linear(shape[0], shape[2], 1, 1, dtype, seed=1, device=device).x


def eager_multi(case):
    """What eager torch makes of a :class:`~lora_kernels.testing.MultiCase`."""
    return eager_multi_lora_linear(*_terms(case))


def exact_multi(case):
    """The same in float64."""
    return exact_multi_lora_linear(*_terms(case))


def _terms(case):
    banks = (case.a_bank, case.b_bank, case.slot_scalings)
    return case.x, case.weight, case.bias, *banks, case.token_slots, case.slot_ranks


_TRAIN = ("lora_linear_train", "lora_linear_backward")
# Check -> (case, the ops that it needs).
CHECKS = {
    "lora_linear": (_linear, ("lora_linear", "lora_linear_out")),
    "lora_linear, gradients": (_linear_backward, _TRAIN),
    "lora_linear, dropout": (_dropout_backward, _TRAIN),
    "dropout_mask": (_dropout_mask, ("dropout_mask",)),
    "lora_add_": (_add, ("lora_add_",)),
    "lora_add_, gradients": (_add_backward, ("lora_add_train_", "lora_linear_backward")),
    "multi_lora_linear, banks": (_multi, ("multi_lora_linear",)),
    "multi_lora_linear, lists": (_multi_list, ("multi_lora_linear_list",)),
    "multi_lora_linear, gradients": (_multi_backward, ("multi_lora_linear_list", "multi_lora_backward")),
    "grouped_lora_linear": (_grouped, ("grouped_lora_linear", "grouped_lora_backward")),
    "lora_shrink, lora_expand_": (_shrink_expand, ("lora_shrink", "lora_expand_")),
    "lora_embedding": (_embedding, ("lora_embedding", "lora_embedding_backward")),
}
