"""Launchers that the backward of one adapter and of several share. See triton_train_kernels.py.

A ``segments`` argument is None, all rows belonging to one adapter, or (row_order, segment_starts) of a plan.
"""

import math

import torch

from .. import triton_host as host
from .. import tuning
from . import train_config, triton_train_kernels


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
    batch_invariant=False,
):
    """One read of ``left`` (M, columns): the planes of leftᵀ · right and of left · factor.

    Args:
        factor: (slots, columns, R); its dtype is that of the thin operands also where it is not read.
        scalings: float32 (slots) or 0-d that multiplies both, or None.
        right: (M, S · R) with unit column stride; None: no gradient is asked for.
        need_low: whether left · factor is asked for.
        mask: dropout's packed bits of ``left``, or None.
        by_rank: store the gradient as (R, columns), as A is.
        batch_invariant: the widths of strips must not depend on the number of rows.

    Returns:
        grads (splits, slots, columns, R) or (splits, slots, R, columns), and lows [(strips, M, R) for each slice];
        float32, None where not asked for.
    """
    (num_rows, num_columns), rank, widths = left.shape, factor.shape[2], tuple(out_splits or (left.shape[1],))
    precision = host.full_precision(left, factor)

    def strips_of(block_n):
        return sum(-(-width // block_n) for width in widths)

    tiles = None
    if out_splits is None and precision != "tf32x3" and not batch_invariant and host.aligned(left):
        given = {"M": num_rows, "K": num_columns, "R": rank, "G": int(right is not None), "H": int(need_low)}
        given |= {"D": int(mask is not None), "L": num_slots if segments else 0, "B": left.element_size()}
        tiles = tuning.measured("skinny", host.gpu_name(left), **given)
    tiles = tiles or train_config.skinny(
        num_rows, strips_of, rank, num_slots, left.element_size(), precision == "tf32x3", mask is not None,
        host.aligned(left), host.capability(left), host.num_sms(left),
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
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_R=tiles.block_r,
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


def low_rank_of(lows, num_rows, rank, dtype, multiplier=1.0, out=None):
    """The sums of the planes of each slice side by side: (M, S · R) in ``dtype``, or in ``out``."""
    g = torch.empty((num_rows, len(lows) * rank), dtype=dtype, device=lows[0].device) if out is None else out
    for index, planes in enumerate(lows):
        sum_planes(g[:, index * rank : (index + 1) * rank], planes, multiplier)
    return g


def input_gradient(dx, dys, weights, g, lora_a, *, mask=None, row_slots=None, batch_invariant=False):
    """dx = Σ dys[i] · weights[i] + g · A, with dropout's mask on the last term.

    Args:
        dx: (M, in), written.
        dys, weights: tuples of (M, outᵢ) and (outᵢ, in); none for the last term alone.
        g: (M, R), unit column stride, the dtype of A.
        lora_a: (slots, R, in).
        row_slots: int32 (M), the slot of each row, −1 for none; None: all rows are of slot 0.
    """
    if dx.numel() == 0:
        return
    num_rows, in_features = dx.shape
    # Wide tiles spill where rows of dx begin at no multiple of 16 elements, and several adapters' also where they are
    # read through pointers; with the last term alone they gain nothing.
    aligned = 0 < len(dys) <= host.MOST_DESCRIPTORS and in_features % 16 == 0
    aligned = aligned and all(host.aligned(tensor) for tensor in (*dys, *weights))
    aligned = aligned and (row_slots is None or host.tma_ready(*dys, *weights))
    mixed = dx.dtype != lora_a.dtype
    tiles = None
    if aligned and not (mixed or batch_invariant):
        sizes = {"M": num_rows, "K": in_features, "N": sum(dy.shape[1] for dy in dys), "R": g.shape[1], "T": len(dys)}
        slots = 0 if row_slots is None else lora_a.shape[0]
        sizes |= {"D": int(mask is not None), "L": slots, "B": dx.element_size()}
        tiles = tuning.measured("input_gradient", host.gpu_name(dx), **sizes)
    tiles = tiles or train_config.input_gradient(
        num_rows, dx.element_size(), mixed, mask is not None, aligned, row_slots is not None, host.capability(dx),
        batch_invariant,
    )  # fmt: skip
    low_precision = host.precision(dx, lora_a)
    crowded = row_slots is not None or len(dys) > 1 or tiles.block_n > 128
    tiles_n = -(-in_features // tiles.block_n)
    programs = host.num_sms(dx)
    widths = tuple(dy.shape[1] for dy in dys) or (0,)  # a kernel takes no empty tuple
    tma = tiles.tma and 0 < len(dys) <= host.MOST_DESCRIPTORS and host.tma_ready(*dys, *weights)
    strides = [tuple(t.stride(dim) for t in group) or (0,) for group in (dys, weights) for dim in (0, 1)]
    operands = (dys, weights) if dys and not tma else ((None,), (None,))
    described = (dys, weights) if tma else ((), ())
    blocks = ([tiles.block_m, tiles.block_k], [tiles.block_k, tiles.block_n])
    described = (d for group, block in zip(described, blocks, strict=True) for d in host.descriptors(group, block))
    triton_train_kernels.dx_kernel[(min(-(-num_rows // tiles.block_m) * tiles_n, programs),)](
        dx, *operands, *described, g, lora_a, mask, row_slots, num_rows, in_features, widths, g.shape[1],
        -(-in_features // 8), *dx.stride(), *strides, g.stride(0),
        *lora_a.stride(), tiles_n,
        NUM_TERMS=len(dys), HAS_MASK=mask is not None, MULTI=row_slots is not None,
        EVEN_K=all(width % tiles.block_k == 0 for width in widths), TMA=tma,
        PRECISION=host.precision(dx), LOW_PRECISION=low_precision,
        UPCAST=host.upcast(dx, lora_a), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        BLOCK_R=train_config.dx_block_rank(g.shape[1], low_precision == "tf32x3", crowded),
        GROUP_M=tiles.group_m, NUM_PROGRAMS=programs,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
