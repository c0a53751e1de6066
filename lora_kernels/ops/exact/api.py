"""``merge_exact_``, ``unmerge_exact_``, ``switch_exact_``: merging that undoes itself bit for bit."""

import torch
from torch import Tensor

from .. import checks, dispatch
from ..linear.api import mark_written
from ..scalars import scaling_tensor
from .reference import MALFORMED, NOT_FINITE, OK, blocks
from .residual import MergeResidual, adapter_digest


def _run(name, weight, *args):
    """Calls the op; its outputs but the status, which becomes an error where there is one."""
    with torch.no_grad():
        outputs = dispatch.select(name, weight)(weight, *args)
    *made, status = outputs if isinstance(outputs, tuple) else (outputs,)
    code, block = status.tolist()
    if code == OK:
        mark_written(weight)
        return made
    where = ""
    if block >= 0:
        r0, r1, c0, c1 = blocks(*weight.shape)[block]
        where = f" (rows {r0} to {r1 - 1}, columns {c0} to {c1 - 1})"
    if code == NOT_FINITE:
        what = "weight, lora_a, lora_b, scaling: an Inf or NaN in them or in the merged weight" + where
    elif code == MALFORMED:
        what = "residual: its body is damaged or that of another weight"
    elif block >= 0:
        what = "residual: does not fit the weight, which was changed after the merge, or the residual was" + where
    else:
        raise MemoryError(f"{name}: out of memory; nothing was changed")
    raise ValueError(what + "; nothing was changed")


def _adapter(weight, lora_a, lora_b, scaling, names=("lora_a", "lora_b", "scaling")):
    checks.merge(weight, lora_a, lora_b, names[:2])
    if weight.dtype not in checks.KERNEL_DTYPES:
        raise TypeError(f"weight: expected float32, float16 or bfloat16 for an exact merge, got {weight.dtype}")
    return lora_a, lora_b, scaling_tensor(scaling, weight, names[2])


def _triple(weight, adapter, name):
    if not isinstance(adapter, (tuple, list)) or len(adapter) != 3:
        raise TypeError(f"{name}: expected (lora_a, lora_b, scaling), got {adapter!r:.80}")
    return _adapter(weight, *adapter, names=(f"{name}[0] (lora_a)", f"{name}[1] (lora_b)", f"{name}[2] (scaling)"))


def _body(weight, adapter, residual):
    """The bytes of a residual that belongs to this weight and adapter."""
    if not isinstance(residual, MergeResidual):
        raise TypeError(f"residual: expected a MergeResidual, got {type(residual).__name__}")
    if residual.shape != tuple(weight.shape) or residual.dtype != weight.dtype:
        raise ValueError(
            f"residual: expected one of a {weight.dtype} weight of shape {tuple(weight.shape)}, "
            f"got {residual.dtype} {residual.shape}"
        )
    if residual.digest != adapter_digest(*adapter):
        raise ValueError("residual: another adapter was merged: lora_a, lora_b or scaling are not what they were then")
    return residual.body.to(weight.device)


def merge_exact_(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor) -> MergeResidual:
    """``W ← W + scaling · B A`` in place, so that :func:`unmerge_exact_` restores every bit.

    The arithmetic is fixed (docs/residual_format.md): the same bits on every machine, thread count and backend,
    which are in general not those of :func:`merge_`.

    Args:
        weight: (out_features, in_features), float32, float16 or bfloat16, any strides. Written.
        lora_a: (rank, in_features), dtype of ``weight`` or float32.
        lora_b: (out_features, rank), dtype of ``weight`` or float32.
        scaling: float or 0-d tensor.

    Returns:
        A :class:`MergeResidual`, 0.05 to 1 bits a weight for usual updates. Several merges are undone in reverse.

    Raises:
        ValueError, TypeError: bad arguments as in :func:`merge_`, or an Inf or NaN in an argument or in the merged
            weight. The weight is then unchanged.
    """
    adapter = _adapter(weight, lora_a, lora_b, scaling)
    digest = adapter_digest(*adapter)
    (body,) = _run("merge_exact_", weight, *adapter)
    return MergeResidual(weight.shape, weight.dtype, digest, body)


def unmerge_exact_(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor, residual: MergeResidual
) -> Tensor:
    """Undoes :func:`merge_exact_`, bit for bit. Arguments as there, with the residual it returned.

    Returns:
        ``weight``.

    Raises:
        ValueError, TypeError: another adapter, an adapter, weight or residual that was changed, or merges undone
            in another order than the reverse. The weight is then unchanged.
    """
    adapter = _adapter(weight, lora_a, lora_b, scaling)
    _run("unmerge_exact_", weight, *adapter, _body(weight, adapter, residual))
    return weight


def switch_exact_(
    weight: Tensor,
    old: tuple[Tensor, Tensor, float | Tensor],
    new: tuple[Tensor, Tensor, float | Tensor],
    residual: MergeResidual,
) -> MergeResidual:
    """Replaces one exactly merged adapter by another in one pass over the weight.

    Args:
        weight: as in :func:`merge_exact_`. Written.
        old, new: ``(lora_a, lora_b, scaling)`` of the adapter that is merged and of the one to merge instead;
            their ranks and dtypes may differ.
        residual: of ``old``.

    Returns:
        The :class:`MergeResidual` of ``new``: it and the weight are, bit for bit, what merging ``new`` into the
        original weight gives.

    Raises:
        ValueError, TypeError: as in :func:`merge_exact_` and :func:`unmerge_exact_`. The weight is then unchanged.
    """
    old, new = _triple(weight, old, "old"), _triple(weight, new, "new")
    body, digest = _body(weight, old, residual), adapter_digest(*new)
    (made,) = _run("switch_exact_", weight, *old, *new, body)
    return MergeResidual(weight.shape, weight.dtype, digest, made)
