"""``merge_``, ``unmerge_`` and ``switch_``: the update into the weight, in place, in one pass; a list at a time too."""

from .. import checks, cuda_choice, dispatch
from ..linear.api import mark_written
from ..scalars import scaling_tensor


def merge_(weight, lora_a, lora_b, scaling, *, safe=False):
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


def unmerge_(weight, lora_a, lora_b, scaling, *, safe=False):
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


def merge_list_(weights, adapters):
    """:func:`merge_` over many weights, a whole model's at once: on a GPU in a launch for every 35 of them.

    The pointers are arguments of the kernel: nothing is uploaded and the host does not wait. A CUDA graph keeps them,
    so it must be captured anew when a weight or a factor moves; values may change.

    Args:
        weights: a sequence of weights as in :func:`merge_`, on any devices. Written, in order.
        adapters: ``(lora_a, lora_b, scaling)`` of each.

    Raises:
        ValueError, TypeError: as in :func:`merge_`, before the first weight is written.
    """
    _apply_list(weights, adapters, 1.0)


def unmerge_list_(weights, adapters):
    """The inverse of :func:`merge_list_`, up to rounding. Arguments as there."""
    _apply_list(weights, adapters, -1.0)


def _apply_list(weights, adapters, sign):
    weights, adapters = list(weights), list(adapters)
    if len(weights) != len(adapters):
        raise ValueError(f"adapters: expected one for each of {len(weights)} weights, got {len(adapters)}")
    terms = []
    for index, (weight, adapter) in enumerate(zip(weights, adapters, strict=True)):
        name = f"adapters[{index}]"
        if not isinstance(adapter, (tuple, list)) or len(adapter) != 3:
            raise TypeError(f"{name}: expected (lora_a, lora_b, scaling), got {adapter!r:.80}")
        lora_a, lora_b, scaling = adapter
        checks.merge(weight, lora_a, lora_b, (f"{name}[0] (lora_a)", f"{name}[1] (lora_b)"))
        terms.append((weight, lora_a, lora_b, scaling_tensor(scaling, weight, f"{name}[2] (scaling)")))
        if weight.is_cuda and dispatch.forced in cuda_choice.PREFERENCE:
            cuda_choice.refuse(dispatch.forced, "merge_", terms[-1])
    for group in _together(terms):
        if len(group) == 1:
            dispatch.select("merge_", group[0][0])(*group[0], sign)
        else:
            dispatch.select("merge_list_", group[0][0])(*map(list, zip(*group, strict=True)), sign)
    for weight in weights:
        mark_written(weight)


def _together(terms):
    """The terms in lists that one call may take: weights of one GPU of which no two overlap, where a kernel for lists
    runs there; one by one otherwise."""
    groups, spans, open_ = [], [], False
    for term in terms:
        weight, span = term[0], _span(term[0])
        listed = cuda_choice.takes_lists(weight, dispatch.forced)
        apart = all(span[0] >= end or start >= span[1] for start, end in spans)
        if listed and open_ and apart and weight.device == groups[-1][0][0].device:
            groups[-1].append(term)
        else:
            groups.append([term])
            spans = []
        open_ = listed
        spans.append(span)
    return groups


def _span(weight):
    """First and one past the last address of a weight."""
    start, size = weight.data_ptr(), weight.element_size()
    last = sum((n - 1) * stride for n, stride in zip(weight.shape, weight.stride(), strict=True))
    last = last if weight.numel() else -1
    return start, start + (last + 1) * size


def switch_(weight, old, new):
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
