"""The calls that are timed: launchers on random tensors, the large operand rotated over copies larger than L2."""

import dataclasses
import itertools

import torch

from ..ops.grouped import triton as grouped
from ..ops.linear import triton as linear
from ..ops.linear import triton_gradients as gradients
from ..ops.merge import triton as merge
from ..ops.multi import triton as multi
from ..ops.multi.plan import plan_batch

_CACHE_BYTES, _MAX_COPIES = 96 << 20, 16


@dataclasses.dataclass
class Call:
    """``run()`` makes one call on the next copy of the operand that is large; there are ``copies`` of it."""

    run: object
    copies: int


def call_of(problem, dtype, device):
    """The :class:`Call` of a :class:`~.candidates.Problem`."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    return _CALLS[problem.op](problem, normal, torch.ones((), device=device))


def _rotated(tensor, run):
    count = min(_MAX_COPIES, max(2, -(-_CACHE_BYTES // max(1, tensor.numel() * tensor.element_size()))))
    turn = itertools.cycle([tensor, *(tensor.clone() for _ in range(count - 1))])
    return Call(lambda: run(next(turn)), count)


def _linear(p, normal, one):
    x, a, b = normal(p.num_tokens, p.in_features), normal(p.rank, p.in_features), normal(p.out_features, p.rank)
    y = x.new_empty((p.num_tokens, p.out_features))
    weight = normal(p.out_features, p.in_features)
    return _rotated(weight, lambda w: linear.lora_linear_out(y, x, w, None, a, b, one, None, False))


def _rows(p, one):
    """(scalings, plan's tensors): rows take the slots in turn."""
    slots = torch.arange(p.num_tokens, dtype=torch.int32, device=one.device) % p.num_slots
    plan = plan_batch(slots, num_slots=p.num_slots)
    return one.repeat(p.num_slots), (plan.row_order, plan.segment_starts)


def _multi(p, normal, one):
    scalings, plan = _rows(p, one)
    x, weight = normal(p.num_tokens, p.in_features), normal(p.out_features, p.in_features)
    banks = (normal(p.num_slots, p.rank, p.in_features), normal(p.num_slots, p.out_features, p.rank), scalings)
    return _rotated(weight, lambda w: multi.multi_lora_linear(x, w, None, *banks, None, *plan, None, False))


def _shrink(p, normal, one):
    _, plan = _rows(p, one)
    x, a = normal(p.num_tokens, p.in_features), normal(p.num_slots, p.rank, p.in_features)
    return _rotated(a, lambda bank: multi.lora_shrink(x, bank, None, *plan, False))


def _expand(p, normal, one):
    scalings, plan = _rows(p, one)
    y, b = normal(p.num_tokens, p.out_features), normal(p.num_slots, p.out_features, p.rank)
    h = torch.zeros((p.num_tokens, p.rank), device=y.device)
    return _rotated(b, lambda bank: multi.lora_expand_(y, h, bank, scalings, None, *plan, None, False))


def _grouped(p, normal, one):
    x, count = normal(p.num_tokens, p.in_features), len(p.widths)
    a, b = [normal(p.rank, p.in_features) for _ in p.widths], [normal(width, p.rank) for width in p.widths]
    y, weight = [x.new_empty((p.num_tokens, width)) for width in p.widths], normal(p.out_features, p.in_features)
    terms = ([None] * count, a, b, [one] * count, y, p.train, False)
    return _rotated(weight, lambda w: grouped.grouped_lora_linear(x, w.split(p.widths), *terms))


def _mask(p):
    """Dropout's packed bits, half of them set; None without dropout."""
    generator = torch.Generator().manual_seed(0)
    shape = (p.num_tokens, -(-p.in_features // 8))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) if p.dropout else None


def _input_gradient(p, normal, one):
    widths = list(p.widths or (p.out_features,))
    dys, g = [normal(p.num_tokens, width) for width in widths], normal(p.num_tokens, p.rank * len(widths))
    a, dx = normal(max(1, p.num_slots), g.shape[1], p.in_features), normal(p.num_tokens, p.in_features)
    weight, mask = normal(p.out_features, p.in_features), _mask(p)
    options = {"mask": None if mask is None else mask.to(dx.device)}
    if p.num_slots:
        options["row_slots"] = torch.arange(p.num_tokens, dtype=torch.int32, device=dx.device) % p.num_slots
    return _rotated(weight, lambda w: gradients.input_gradient(dx, tuple(dys), w.split(widths), g, a, **options))


def _skinny(p, normal, one):
    left, slots = normal(p.num_tokens, p.in_features), max(1, p.num_slots)
    factor, mask = normal(slots, p.in_features, p.rank), _mask(p)
    right = torch.zeros((p.num_tokens, p.rank), dtype=torch.float32 if p.low else left.dtype, device=left.device)
    options = {"right": right if p.grad else None, "need_low": p.low, "by_rank": not p.low}
    options["mask"] = None if mask is None else mask.to(left.device)
    if p.num_slots:
        one, plan = _rows(p, one)
        options |= {"segments": plan, "num_slots": slots}
    return _rotated(left, lambda tall: gradients.skinny(tall, factor, one, **options))


def _merge(p, normal, one):
    a, b = normal(p.rank, p.in_features), normal(p.out_features, p.rank)
    weight, nothing = normal(p.out_features, p.in_features), one * 0  # the weights stay as they are
    if p.op == "merge_":
        return _rotated(weight, lambda w: merge.merge_(w, a, b, nothing, 1.0))
    return _rotated(weight, lambda w: merge.switch_(w, a, b, nothing, a, b, nothing))


_CALLS = {
    "lora_linear": _linear,
    "multi_lora_linear": _multi,
    "lora_shrink": _shrink,
    "lora_expand_": _expand,
    "input_gradient": _input_gradient,
    "skinny": _skinny,
    "grouped_lora_linear": _grouped,
    "merge_": _merge,
    "switch_": _merge,
}
