"""Launchers that the backward of one adapter and of several share. See triton_train_kernels.py.

A ``segments`` argument is None, all rows belonging to one adapter, or (row_order, segment_starts) of a plan.
"""

import math

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import triton_host as host
from . import train_config, triton_train_kernels
from .triton import _aligned


def skinny(
    left,
    factor,
    scalings,
    *,
    right=None,
    need_low,
    mask=None,
    out_splits=None,
    segments=None,
    num_slots=1,
    by_rank=False,
):
    """One read of ``left`` (M, columns): the planes of leftᵀ · right and of left · factor.

    Args:
        factor: (slots, columns, R); its dtype is that of the thin operands also where it is not read.
        scalings: float32 (slots) or 0-d that multiplies both, or None.
        right: (M, S · R) with unit column stride; None: no gradient is asked for.
        need_low: whether left · factor is asked for.
        mask: dropout's packed bits of ``left``, or None.
        by_rank: store the gradient as (R, columns), as A is.

    Returns:
        grads (splits, slots, columns, R) or (splits, slots, R, columns), and lows [(strips, M, R) for each slice];
        float32, None where not asked for.
    """
    (num_rows, num_columns), rank, widths = left.shape, factor.shape[2], tuple(out_splits or (left.shape[1],))
    precision = host.full_precision(left, factor)

    def strips_of(block_n):
        return sum(-(-width // block_n) for width in widths)

    tiles = train_config.skinny(
        num_rows, strips_of, rank, num_slots, left.element_size(), precision == "tf32x3", mask is not None,
        _aligned(left), host.capability(left), host.num_sms(left),
    )  # fmt: skip
    strips, rank_blocks = strips_of(tiles.block_n), -(-rank // tiles.block_r)
    grads = lows = grad_strides = None
    if right is not None:
        shape = (rank, num_columns) if by_rank else (num_columns, rank)
        grads = torch.empty((tiles.split, num_slots, *shape), dtype=torch.float32, device=left.device)
        strides = grads.stride()
        grad_strides = (*strides[:2], *(reversed(strides[2:]) if by_rank else strides[2:]))
    if need_low:
        lows = torch.empty((strips, num_rows, rank), dtype=torch.float32, device=left.device)
    if strips and rank_blocks * num_slots:
        triton_train_kernels.skinny_kernel[(strips, tiles.split, rank_blocks * num_slots)](
            grads, lows, left, right, factor, mask, scalings, *(segments or (None, None)),
            num_rows, num_columns, rank, -(-num_columns // 8), rank_blocks,
            *left.stride(), 0 if right is None else right.stride(0), *factor.stride(), *(grad_strides or (0,) * 4),
            WIDTHS=tuple(out_splits or ()), NUM_SLICES=len(out_splits or ()), ALIGN=math.gcd(16, *widths),
            NEED_GRAD=right is not None, NEED_LOW=need_low, HAS_MASK=mask is not None, GATHER=segments is not None,
            PRECISION=precision, UPCAST=host.upcast(left, factor),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_R=tiles.block_r, SPLIT=tiles.split,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    if need_low:
        lows = list(lows.split([-(-width // tiles.block_n) for width in widths]))
    return grads, lows


def sum_planes(out, planes, multiplier=1.0):
    """out (M, N) = multiplier · Σ planes (P, M, N), in their order; any strides."""
    num_rows, num_columns = out.shape
    if out.numel() == 0:
        return out
    block_m, block_n = (16, 32) if host.INTERPRETED else (64, 16) if num_columns <= 32 else (8, 128)
    triton_train_kernels.sum_planes_kernel[(-(-num_rows // block_m), -(-num_columns // block_n))](
        out, planes, multiplier, num_rows, num_columns, planes.shape[0], *out.stride(), *planes.stride(),
        UPCAST=host.upcast(out), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return out


def low_rank_of(lows, num_rows, rank, dtype, multiplier=1.0):
    """The sums of the planes of each slice side by side: (M, S · R) in ``dtype``."""
    g = torch.empty((num_rows, len(lows) * rank), dtype=dtype, device=lows[0].device)
    for index, planes in enumerate(lows):
        sum_planes(g[:, index * rank : (index + 1) * rank], planes, multiplier)
    return g


def input_gradient(dx, dy, weight, g, lora_a, *, mask=None, row_slots=None, batch_invariant=False):
    """dx = dy · weight + g · A, with dropout's mask on the second term.

    Args:
        dx: (M, in), written.
        weight: (out, in), or None for the second term alone.
        g: (M, R), unit column stride, the dtype of A.
        lora_a: (slots, R, in).
        row_slots: int32 (M), the slot of each row, −1 for none; None: all rows are of slot 0.
    """
    if dx.numel() == 0:
        return
    num_rows, in_features = dx.shape
    out_features = dy.shape[1]
    aligned = _aligned(dy) and (weight is None or _aligned(weight))
    mixed = dy.dtype != lora_a.dtype
    tiles = train_config.input_gradient(
        num_rows, dy.element_size(), mixed, mask is not None, aligned, row_slots is not None, host.capability(dy),
        batch_invariant,
    )  # fmt: skip
    low_precision = host.precision(dy, lora_a)
    tiles_n = -(-in_features // tiles.block_n)
    programs = min(-(-num_rows // tiles.block_m) * tiles_n, host.num_sms(dy))
    tma = tiles.tma and weight is not None and host.tma_ready(dy, weight)
    operands = (dy, weight)
    if tma:
        blocks = ((dy, tiles.block_m, tiles.block_k), (weight, tiles.block_k, tiles.block_n))
        operands = [TensorDescriptor.from_tensor(tensor, [rows, columns]) for tensor, rows, columns in blocks]
    triton_train_kernels.dx_kernel[(programs,)](
        dx, *operands, g, lora_a, mask, row_slots, num_rows, in_features, out_features, g.shape[1],
        -(-in_features // 8), *dx.stride(), *dy.stride(), *((0, 0) if weight is None else weight.stride()), g.stride(0),
        *lora_a.stride(), tiles_n,
        HAS_WEIGHT=weight is not None, HAS_MASK=mask is not None, MULTI=row_slots is not None,
        EVEN_K=out_features % tiles.block_k == 0, TMA=tma, PRECISION=host.precision(dy), LOW_PRECISION=low_precision,
        UPCAST=host.upcast(dy, lora_a), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        BLOCK_R=train_config.dx_block_rank(g.shape[1], low_precision == "tf32x3", row_slots is not None),
        GROUP_M=tiles.group_m, NUM_PROGRAMS=programs,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
