"""``multi_lora_linear``, ``lora_shrink`` and ``lora_expand_``: one adapter a row, in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import checks, dispatch
from ..linear.api import autocast_dtype, cast_factors, flat_and_cast, mark_written
from ..linear.autograd import distinct, rows_of
from ..wide import wide_dtype
from .autograd import MultiLoraLinear, live_part
from .plan import BatchPlan, check_plan


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a_bank: Tensor | Sequence[Tensor],
    b_bank: Tensor | Sequence[Tensor],
    slot_scalings: Tensor,
    plan: BatchPlan,
    *,
    out_splits: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``x Wᵀ + bias`` with, on each row, the update of the adapter in that row's slot (Punica, arXiv:2310.18547).

    Rows with slot −1 are bitwise what the same backend gives with no adapter. An Inf or NaN in one adapter
    changes no row of another. Only the live rank of a slot is computed. Differentiable in ``x``, ``weight``,
    ``bias`` and the adapters; not twice.

    Args:
        x: (…, in_features), num_tokens rows in all.
        weight, bias: as in :func:`lora_linear`.
        a_bank: (num_slots, max_rank, in_features), (num_slots, slices, max_rank, in_features) with
            ``out_splits``; or a list of ``lora_a`` tensors, one a slot, of any ranks.
        b_bank: (num_slots, out_features, max_rank); or a list of ``lora_b`` tensors.
        slot_scalings: float32 (num_slots) tensor; float64 too where ``x`` is.
        plan: :class:`BatchPlan` of the rows of ``x``.
        out_splits: widths of the slices of a stacked projection.
        out: (…, out_features) tensor to write into; no gradients.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; the message names it.
    """
    listed = isinstance(a_bank, (list, tuple))
    try:
        x2, weight, bias, device_type = flat_and_cast(x, weight, bias)
        if autocast_dtype(device_type) is x2.dtype:
            if listed:
                a_bank, b_bank = cast_factors(a_bank, x2.dtype), cast_factors(b_bank, x2.dtype)
            else:
                a_bank, b_bank = cast_factors((a_bank, b_bank), x2.dtype)
        native = not dispatch.check_first and device_type == "cpu" and not torch.compiler.is_compiling()
        if not (native and _agree(x2, a_bank, b_bank, slot_scalings, plan, listed)):
            _check(x2, weight, bias, a_bank, b_bank, slot_scalings, plan, out_splits, listed)
        adapters = (*a_bank, *b_bank) if listed else (a_bank, b_bank)
        grad = torch.is_grad_enabled() and (
            x2.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or any(tensor.requires_grad for tensor in adapters)
        )
        grad = grad and not dispatch.jit_traces()
        if out is not None:
            checks.out(out, x.to(x2.dtype), weight)
            if grad or (out.requires_grad and torch.is_grad_enabled()):
                raise ValueError("out: can not be combined with gradients; call under torch.no_grad()")
            banks = _by_name(a_bank, b_bank, listed)
            checks.in_place("out", out, x=x2, weight=weight, bias=bias, slot_scalings=slot_scalings, **banks)
        if grad or forward_ad._current_level >= 0:  # the function refuses tangents
            if not listed and plan.slot_ranks is not None:
                adapters = live_part(a_bank, b_bank, plan.slot_ranks, out_splits)
            y = MultiLoraLinear.apply(listed, x2, weight, bias, slot_scalings, plan, out_splits, *distinct(adapters))
        else:
            y = run(listed, x2, weight, bias, slot_scalings, plan, out_splits, adapters)
    except (RuntimeError, AttributeError, IndexError, TypeError):
        _explain_refusal(x, weight, bias, a_bank, b_bank, slot_scalings, plan, out_splits, listed)
        raise
    y = y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])
    return y if out is None else out.copy_(y)


def _by_name(a_bank, b_bank, listed):
    """The tensors of the adapters by the names that errors call them."""
    if not listed:
        return {"a_bank": a_bank, "b_bank": b_bank}
    slots = enumerate(zip(a_bank, b_bank, strict=True))
    return {f"{name}[{slot}]": tensor for slot, pair in slots for name, tensor in zip(("lora_a", "lora_b"), pair)}


def _agree(x, a_bank, b_bank, slot_scalings, plan, listed):
    """What a native kernel can not see for itself: that batch, bank and plan are made for one another."""
    slots = plan.num_slots
    sizes = plan.num_tokens == x.shape[0] and len(a_bank) == slots and len(b_bank) == slots
    alike = isinstance(b_bank, (list, tuple)) is listed
    return sizes and alike and len(slot_scalings) == slots and not slot_scalings.requires_grad


def _explain_refusal(x, weight, bias, a_bank, b_bank, slot_scalings, plan, out_splits, listed):
    """After a kernel refused its input: the error that names the argument, if an argument is to blame."""
    base = (x, weight, bias)
    for name, value in zip(("x", "weight"), base[:2], strict=True):
        checks.tensor(name, value)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype is not torch.float64:
        base = [value if value is None else value.to(dtype) for value in base]
    _check(rows_of(base[0]) if x.dim() else x, *base[1:], a_bank, b_bank, slot_scalings, plan, out_splits, listed)


def run(listed, x, weight, bias, slot_scalings, plan, out_splits, adapters):
    """The op for banks or for lists, without gradients; ``adapters`` is (*A, *B)."""
    invariant, rows = dispatch.batch_invariant, (plan.row_order, plan.segment_starts)
    if listed:
        op, half = dispatch.select("multi_lora_linear_list", x), len(adapters) // 2
        lora_a, lora_b = list(adapters[:half]), list(adapters[half:])
        return op(x, weight, bias, lora_a, lora_b, slot_scalings, *rows, out_splits, invariant)
    op = dispatch.select("multi_lora_linear", x)
    return op(x, weight, bias, *adapters, slot_scalings, plan.slot_ranks, *rows, out_splits, invariant)


def lora_shrink(x: Tensor, a_bank: Tensor, plan: BatchPlan, *, out: Tensor | None = None) -> Tensor:
    """``h = x Aᵀ`` with each row's own A, for engines that run their own base product.

    Args:
        x: (num_tokens, in_features).
        a_bank: (num_slots, max_rank, in_features) or (num_slots, slices, max_rank, in_features).
        plan: :class:`BatchPlan` of the rows of ``x``.
        out: float32 tensor of the result's shape to write into.

    Returns:
        float32 (num_tokens, max_rank) or (num_tokens, slices, max_rank); zero beyond the live rank and on
        rows with slot −1. No gradients.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; the message names it.
    """
    checks.tensor("x", x, 2)
    checks.tensor("a_bank", a_bank, 3, 4)
    checks.floating("x", x)
    checks.adapter_dtype("a_bank", a_bank, x.dtype)
    if a_bank.shape[-1] != x.shape[1]:
        raise ValueError(f"a_bank: expected last dimension in_features = {x.shape[1]}, got {tuple(a_bank.shape)}")
    check_plan(plan, x.shape[0], a_bank.shape[0], a_bank.shape[1] if a_bank.dim() == 4 else 1)
    checks.same_device(x, a_bank=a_bank, plan=plan.row_order)
    _refuse_grad("lora_shrink", x=x, a_bank=a_bank)
    if out is not None:
        checks.tensor("out", out)
        if out.dtype is not wide_dtype(x):
            raise TypeError(f"out: expected {wide_dtype(x)}, got {out.dtype}")
        checks.in_place("out", out, x=x, a_bank=a_bank)
    op = dispatch.select("lora_shrink", x)
    h = op(x, a_bank, plan.slot_ranks, plan.row_order, plan.segment_starts, dispatch.batch_invariant)
    if out is None:
        return h
    checks.size("out", out, h.shape, "of the result")
    return out.copy_(h)


def lora_expand_(
    y: Tensor,
    h: Tensor,
    b_bank: Tensor,
    slot_scalings: Tensor,
    plan: BatchPlan,
    *,
    out_splits: Sequence[int] | None = None,
) -> Tensor:
    """``y += scaling · h Bᵀ`` in place with each row's own B; ``h`` comes from :func:`lora_shrink`.

    Args:
        y: (num_tokens, out_features), float32, float16 or bfloat16. Written.
        h: float32 (num_tokens, max_rank) or (num_tokens, slices, max_rank).
        b_bank: (num_slots, out_features, max_rank).
        slot_scalings: float32 (num_slots).
        plan, out_splits: as in :func:`multi_lora_linear`.

    Returns:
        ``y``. No gradients.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; the message names it. ``y`` is then
            unchanged.
    """
    checks.tensor("y", y, 2)
    checks.floating("y", y)
    checks.tensor("b_bank", b_bank, 3)
    checks.adapter_dtype("b_bank", b_bank, y.dtype)
    checks.splits(out_splits, y.shape[1])
    if b_bank.shape[1] != y.shape[1]:
        raise ValueError(f"b_bank: expected (num_slots, out_features = {y.shape[1]}, rank), got {tuple(b_bank.shape)}")
    checks.tensor("h", h, 2, 3)
    slices = () if h.dim() == 2 else (len(out_splits or (0,)),)
    checks.size("h", h, (y.shape[0], *slices, b_bank.shape[2]), "(num_tokens, [slices,] max_rank)")
    if h.dtype != wide_dtype(y):
        raise TypeError(f"h: expected {wide_dtype(y)}, got {h.dtype}")
    check_plan(plan, y.shape[0], b_bank.shape[0], len(out_splits or (0,)))
    _check_scalings(slot_scalings, b_bank.shape[0], y)
    checks.same_device(y, h=h, b_bank=b_bank, plan=plan.row_order)
    _refuse_grad("lora_expand_", y=y, h=h, b_bank=b_bank)
    checks.in_place("y", y, h=h, b_bank=b_bank)
    op = dispatch.select("lora_expand_", y)
    plan_tensors = (plan.slot_ranks, plan.row_order, plan.segment_starts)
    target = y if y.shape[-1] <= 1 or y.stride(-1) == 1 else y.contiguous()
    op(target, h, b_bank, slot_scalings, *plan_tensors, out_splits, dispatch.batch_invariant)
    if target is not y:
        return y.copy_(target)
    mark_written(y)
    return y


def _refuse_grad(name, **tensors):
    if torch.is_grad_enabled():
        for argument, tensor in tensors.items():
            if tensor.requires_grad:
                raise ValueError(f"{argument}: {name} computes no gradients; use multi_lora_linear or torch.no_grad()")


def _check_scalings(slot_scalings, num_slots, like):
    checks.tensor("slot_scalings", slot_scalings, 1)
    checks.size("slot_scalings", slot_scalings, (num_slots,), "(num_slots,)")
    if slot_scalings.dtype not in (torch.float32, wide_dtype(like)) or slot_scalings.requires_grad:
        raise TypeError(f"slot_scalings: expected {wide_dtype(like)} without gradient, got {slot_scalings.dtype}")
    checks.same_device(like, slot_scalings=slot_scalings)


def _check(x, weight, bias, a_bank, b_bank, slot_scalings, plan, out_splits, listed):
    checks.base(x, weight, bias)
    checks.splits(out_splits, weight.shape[0])
    sizes = (weight.shape[1], weight.shape[0], x.dtype, x)
    if listed:
        if not isinstance(b_bank, (list, tuple)) or len(b_bank) != len(a_bank):
            raise ValueError(f"b_bank: expected a list of {len(a_bank)} tensors, as a_bank is, got {type(b_bank)}")
        for slot, (lora_a, lora_b) in enumerate(zip(a_bank, b_bank, strict=True)):
            checks.adapter(lora_a, lora_b, *sizes, out_splits, where=f"[{slot}]")
    else:
        checks.tensor("a_bank", a_bank, 3 if out_splits is None else 4)
        checks.tensor("b_bank", b_bank, 3)
        if a_bank.shape[0] != b_bank.shape[0]:
            raise ValueError(f"b_bank: expected {a_bank.shape[0]} slots, as a_bank has, got {tuple(b_bank.shape)}")
        if a_bank.shape[0]:
            checks.adapter(a_bank[0], b_bank[0], *sizes, out_splits, where=" of the bank")
    check_plan(plan, x.shape[0], len(a_bank), None if listed else len(out_splits or (0,)))
    _check_scalings(slot_scalings, len(a_bank), x)
    checks.same_device(x, plan=plan.row_order)
