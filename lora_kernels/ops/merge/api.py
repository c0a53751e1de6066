"""``merge_``, ``unmerge_`` and ``switch_``: the update into the weight, in place, in one pass."""

from .. import checks, dispatch
from ..linear.api import mark_written
from ..scalars import scaling_tensor


def merge_(weight, lora_a, lora_b, scaling, *, safe=False):
    """``W ← W + scaling · B A`` in place, accumulated in float32 and rounded once.

    Args:
        weight: (out_features, in_features), float32, float16 or bfloat16, any strides. Written.
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
