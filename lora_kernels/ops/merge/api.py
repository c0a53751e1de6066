"""``merge_``, ``unmerge_`` and ``switch_``: the update into the weight, in place, in one pass; a list at a time too."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import checks, cuda_choice, dispatch, library
from ..linear.api import mark_written
from ..scalars import scaling_tensor


def merge_(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor, *, safe: bool = False) -> Tensor:
    """``W ← W + scaling · B A`` in place, accumulated in float32 and rounded once.

    Args:
        weight: (out_features, in_features), float32, float16, bfloat16, or float64 (then accumulated in float64),
            any strides. Written.
        lora_a: (rank, in_features), dtype of ``weight`` or float32.
        lora_b: (out_features, rank), dtype of ``weight`` or float32.
        scaling: float or 0-d tensor.
        safe: refuse a merge that would leave an Inf or NaN in the weight.

    Returns:
        ``weight``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, a weight whose elements
            overlap, or (``safe``) a result that is not finite. The weight is then unchanged.
    """
    return _apply(weight, lora_a, lora_b, scaling, 1.0, safe)


def unmerge_(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor, *, safe: bool = False) -> Tensor:
    """``W ← W − scaling · B A`` in place: the inverse of :func:`merge_` up to rounding. Arguments as there."""
    return _apply(weight, lora_a, lora_b, scaling, -1.0, safe)


def _apply(weight, lora_a, lora_b, scaling, sign, safe):
    checks.merge(weight, lora_a, lora_b)
    scaling = scaling_tensor(scaling, weight)
    if safe:
        check = dispatch.select("merge_is_finite", weight)
        if not check(weight, lora_a, lora_b, scaling, sign):
            raise ValueError("weight: the merged weight would hold Inf or NaN; nothing was changed")
    dispatch.select("merge_", weight)(weight, lora_a, lora_b, scaling, sign)
    mark_written(weight)
    return weight


def merge_list_(weights: Iterable[Tensor], adapters: Iterable[tuple[Tensor, Tensor, float | Tensor]]) -> None:
    """:func:`merge_` over many weights, a whole model's at once: on a CPU in one call whose threads share all of the
    elements, on a GPU in a launch for every 35 weights.

    On a GPU the pointers are arguments of the kernel: nothing is uploaded and the host does not wait. A CUDA graph
    keeps them, so it must be captured anew when a weight or a factor moves; values may change.

    Args:
        weights: a sequence of weights as in :func:`merge_`, on any devices. Written, in order.
        adapters: ``(lora_a, lora_b, scaling)`` of each.

    Raises:
        ValueError, TypeError: as in :func:`merge_`, before the first weight is written.
    """
    _apply_list(weights, adapters, 1.0)


def unmerge_list_(weights: Iterable[Tensor], adapters: Iterable[tuple[Tensor, Tensor, float | Tensor]]) -> None:
    """The inverse of :func:`merge_list_`, up to rounding. Arguments as there."""
    _apply_list(weights, adapters, -1.0)


def _apply_list(weights, adapters, sign):
    for name, value, what in (("weights", weights, "tensors"), ("adapters", adapters, "(lora_a, lora_b, scaling)")):
        if not isinstance(value, Iterable):
            raise TypeError(f"{name}: expected a sequence of {what}, got {type(value).__name__}")
    weights, adapters = list(weights), list(adapters)
    if len(weights) != len(adapters):
        raise ValueError(f"adapters: expected one for each of {len(weights)} weights, got {len(adapters)}")
    terms, scalings = [], {}  # the scaling is most often one for all
    for index, (weight, adapter) in enumerate(zip(weights, adapters, strict=True)):
        name = f"adapters[{index}]"
        if not isinstance(adapter, (tuple, list)) or len(adapter) != 3:
            raise TypeError(f"{name}: expected (lora_a, lora_b, scaling), got {adapter!r:.80}")
        checks.tensor("weights", weight)
        lora_a, lora_b, scaling = adapter
        if type(scaling) is float:
            key = scaling, weight.dtype, weight.device
            if key not in scalings:
                scalings[key] = scaling_tensor(scaling, weight)
            scaling = scalings[key]
        else:
            scaling = scaling_tensor(scaling, weight, f"{name}[2] (scaling)")
        terms.append((weight, lora_a, lora_b, scaling))
    groups = _together(terms)
    # One call of the native kernel checks all before it writes; several, or others, are checked here first.
    checks_itself = len(groups) == 1 and not dispatch.check_first and all(w.device.type == "cpu" for w in weights)
    if not checks_itself:
        _check_terms(terms)
    try:
        for group in groups:
            if len(group) == 1:
                dispatch.select("merge_", group[0][0])(*group[0], sign)
            else:
                dispatch.select("merge_list_", group[0][0])(*map(list, zip(*group, strict=True)), sign)
    except RuntimeError:
        if checks_itself:
            _check_terms(terms)
        raise
    mark_written(*weights)


def _check_terms(terms):
    for index, term in enumerate(terms):
        checks.merge(*term[:3], (f"adapters[{index}][0] (lora_a)", f"adapters[{index}][1] (lora_b)"))
        if term[0].is_cuda and dispatch.forced in cuda_choice.PREFERENCE:
            cuda_choice.refuse(dispatch.forced, "merge_", term)


def _together(terms):
    """The terms in lists that one call may take: weights of one device of which no two overlap, where a kernel for
    lists runs there; one by one otherwise."""
    takes = [_takes_lists(term[0]) for term in terms]
    if all(takes) and len({term[0].device for term in terms}) == 1:
        ordered = sorted(_span(term[0]) for term in terms)
        if all(before[1] <= after[0] for before, after in itertools.pairwise(ordered)):
            return [terms]
    groups, spans, open_ = [], [], False
    for term, listed in zip(terms, takes, strict=True):
        weight, span = term[0], _span(term[0])
        apart = all(span[0] >= end or start >= span[1] for start, end in spans)
        if listed and open_ and apart and weight.device == groups[-1][0][0].device:
            groups[-1].append(term)
        else:
            groups.append([term])
            spans = []
        open_ = listed
        spans.append(span)
    return groups


def _takes_lists(weight):
    if weight.dtype is torch.float64:  # the reference's alone
        return False
    if weight.device.type == "cpu":
        return dispatch.forced in (None, "cpu") and library.has_cpu_kernel("merge_list_")
    return cuda_choice.takes_lists(weight, dispatch.forced)


def _span(weight):
    """First and one past the last address of a weight."""
    start, size = weight.data_ptr(), weight.element_size()
    if weight.is_contiguous():
        return start, start + weight.nbytes
    last = sum((n - 1) * stride for n, stride in zip(weight.shape, weight.stride(), strict=True))
    last = last if weight.numel() else -1
    return start, start + (last + 1) * size


def switch_(
    weight: Tensor, old: tuple[Tensor, Tensor, float | Tensor], new: tuple[Tensor, Tensor, float | Tensor]
) -> Tensor:
    """``W ← W − s_old · B_old A_old + s_new · B_new A_new`` in place, one pass, rounded once.

    Args:
        weight: as in :func:`merge_`. Written.
        old, new: ``(lora_a, lora_b, scaling)`` of the adapter that is merged and of the one to merge instead;
            their ranks and dtypes may differ.

    Returns:
        ``weight``.

    Raises:
        ValueError, TypeError: as in :func:`merge_`.
    """
    terms = []
    for name, adapter in (("old", old), ("new", new)):
        if not isinstance(adapter, (tuple, list)) or len(adapter) != 3:
            raise TypeError(f"{name}: expected (lora_a, lora_b, scaling), got {adapter!r:.80}")
        lora_a, lora_b, scaling = adapter
        checks.merge(weight, lora_a, lora_b, (f"{name}[0] (lora_a)", f"{name}[1] (lora_b)"))
        terms += [lora_a, lora_b, scaling_tensor(scaling, weight, f"{name}[2] (scaling)")]
    dispatch.select("switch_", weight)(weight, *terms)
    mark_written(weight)
    return weight
