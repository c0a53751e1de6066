"""``row_norm``: the length of each row of ``W + scaling · B A``, which DoRA divides by at every forward."""

import torch

from .. import checks, dispatch
from ..scalars import scaling_tensor
from . import reference


def row_norm(weight, lora_a, lora_b, scaling):
    """``‖W + scaling · B A‖`` by rows, in float32 (DoRA, Liu et al. 2024, arXiv:2402.09353, section 4.3).

    One read of ``weight``; the sum is formed a block of rows at a time, so that rows which the update nearly
    cancels keep their digits, and nothing of the size of ``weight`` is allocated. Not differentiable: DoRA treats
    the norm as a constant.

    Args:
        weight: (rows, columns), float32, float16, bfloat16 or float64, any strides.
        lora_a: (rank, columns), any floating dtype.
        lora_b: (rows, rank), any floating dtype.
        scaling: float, or 0-d tensor.

    Returns:
        (rows) float32; float64 of a float64 weight.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype; the message names it.
    """
    _check(weight, lora_a, lora_b)
    with torch.no_grad():
        scaling = scaling_tensor(scaling.detach() if isinstance(scaling, torch.Tensor) else scaling, weight)
        return dispatch.select("row_norm", weight)(weight, lora_a, lora_b, scaling)


def scale_merge_(weight, lora_a, lora_b, scaling, factors):
    """``W ← diag(factors) · (W + scaling · B A)`` in place, in float32, rounded once: a DoRA merge.

    Args as in :func:`row_norm`; ``factors``: (rows) float32.
    """
    _check(weight, lora_a, lora_b)
    with torch.no_grad():
        return reference.scale_merge_(weight, lora_a, lora_b, scaling, factors)


def scale_unmerge_(weight, lora_a, lora_b, scaling, factors):
    """``W ← diag(factors)⁻¹ · W − scaling · B A`` in place: the inverse of :func:`scale_merge_` up to rounding."""
    _check(weight, lora_a, lora_b)
    with torch.no_grad():
        return reference.scale_unmerge_(weight, lora_a, lora_b, scaling, factors)


def _check(weight, lora_a, lora_b):
    for name, value in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        checks.tensor(name, value)
        if value.dim() != 2:
            raise ValueError(f"{name}: expected 2 dimensions, got shape {tuple(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
    rows, columns = weight.shape
    rank = lora_a.shape[0]
    if lora_a.shape != (rank, columns):
        raise ValueError(f"lora_a: expected shape (rank, {columns}), got {tuple(lora_a.shape)}")
    if lora_b.shape != (rows, rank):
        raise ValueError(f"lora_b: expected shape ({rows}, {rank}), got {tuple(lora_b.shape)}")
