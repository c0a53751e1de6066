"""Device code of training: the dropout mask, skinny products and their fixed-order sums, the gradient of x.

draw          Philox4x32-10, one call for eight columns, one bit an element (dropout.py states it).
skinny        one read of a tall matrix L (rows by many columns) serves two thin products: over its columns L · F, and
              over its rows Lᵀ · H. With L = dY they are dh and dB; with L = X, dA (or h, of several adapters).
              Strips of columns and splits of rows write planes of their own, which
sum_planes    adds in their order: no atomics, the same bits each time.
dx            Σ dY W + g A with all terms in one accumulator. Under dropout the low-rank term comes first, so that the
              mask meets it alone; without dropout it comes last, and nothing of the mask is compiled.
"""

import triton
import triton.language as tl

from ..triton_math import dot, narrow
from ..triton_tiles import column_tile, grouped_tile, keep_block, load_block, row_numbers, store_rows


@triton.jit
def draw_kernel(mask, seed, num_rows, num_columns, num_groups, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr):
    """mask uint8 (M, num_groups): bit c of group g keeps column 8 g + c; padding bits are 0."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    zero = low * 0
    words = tl.philox(tl.load(seed), low, high, zero, zero)
    first = (group % num_groups) * 8
    bits = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(4):
        for half in tl.static_range(2):
            drawn = ((words[i] >> (16 * half)) & 0xFFFF).to(tl.int32)
            keep = (drawn >= THRESHOLD) & (first + 2 * i + half < num_columns)
            bits |= keep.to(tl.int32) << (2 * i + half)
    tl.store(mask + group, bits.to(tl.uint8), mask=group < tl.cast(num_rows, tl.int64) * num_groups)


@triton.jit
def skinny_kernel(
    grads, lows, left, right, factor, mask, scalings, row_order, segment_starts,
    num_rows, num_columns, rank, num_groups, rank_blocks,
    left_row_stride, left_stride, right_row_stride, factor_slot_stride, factor_stride, factor_rank_stride,
    grad_split_stride, grad_slot_stride, grad_stride, grad_rank_stride,
    WIDTHS: tl.constexpr, NUM_SLICES: tl.constexpr, ALIGN: tl.constexpr,
    NEED_GRAD: tl.constexpr, NEED_LOW: tl.constexpr,
    HAS_MASK: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """grads[split, slot, column, r] = s Σ_row left[row, column] · right[row, slice · rank + r]
    lows[strip, row, r] (contiguous) = s Σ_column left[row, column] · factor[slot, column, r]

    GATHER: the rows of a slot are those of its segment of row_order; else all rows, and one slot. ``scalings`` None:
    s is 1. Only rows below num_rows count. ALIGN: a power of two that divides every width.
    """
    strip, split = tl.program_id(0), tl.program_id(1)
    slot, rank_block = tl.program_id(2) // rank_blocks, tl.program_id(2) % rank_blocks
    index, begin, end = column_tile(strip, num_columns, WIDTHS, NUM_SLICES, BLOCK_N)
    if NUM_SLICES > 0:  # what the compiler can not see, and would read one element at a time for
        begin, end = tl.multiple_of(begin, ALIGN), tl.multiple_of(end, ALIGN)
    columns, ranks = begin + tl.arange(0, BLOCK_N), rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    inside, live = columns < end, ranks < rank
    scaling = 1.0
    if scalings is not None:
        scaling = tl.load(scalings + slot)
    if NEED_LOW:
        factor_columns = factor + slot.to(tl.int64) * factor_slot_stride + columns.to(tl.int64)[:, None] * factor_stride
        factor_block = tl.load(
            factor_columns + ranks.to(tl.int64)[None, :] * factor_rank_stride,
            mask=inside[:, None] & live[None, :], other=0.0,
        )  # fmt: skip
    first, last = 0, num_rows
    if GATHER:
        first, last = tl.load(segment_starts + slot + 1), tl.load(segment_starts + slot + 2)
    share = tl.cdiv(tl.cdiv(last - first, BLOCK_M), tl.num_programs(1)) * BLOCK_M
    # A masked block is in registers: as the left operand of wgmma it would be serialised, so it becomes the right one.
    grad = tl.zeros((BLOCK_R, BLOCK_N) if HAS_MASK else (BLOCK_N, BLOCK_R), tl.float32)
    for place in range(first + split * share, tl.minimum(first + (split + 1) * share, last), BLOCK_M):
        rows = place + tl.arange(0, BLOCK_M)
        mine = rows < last
        if GATHER:
            rows = tl.load(row_order + rows, mask=mine, other=0)
            mine = mine & (rows < num_rows)
        else:
            rows = tl.minimum(rows, num_rows - 1)
        left_rows = left + rows.to(tl.int64)[:, None] * left_row_stride
        left_block = tl.load(
            left_rows + columns.to(tl.int64)[None, :] * left_stride, mask=mine[:, None] & inside[None, :], other=0.0
        )
        if HAS_MASK:
            left_block = tl.where(keep_block(mask, rows, begin, num_groups, BLOCK_M, BLOCK_N), left_block, 0.0)
        if NEED_LOW:
            low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            low = dot(left_block, factor_block, low, PRECISION, UPCAST) * scaling
            low_rows = lows + (strip.to(tl.int64) * num_rows + rows.to(tl.int64))[:, None] * rank
            tl.store(low_rows + ranks[None, :], low, mask=mine[:, None] & live[None, :])
        if NEED_GRAD:
            right_rows = right + rows.to(tl.int64)[:, None] * right_row_stride + index * rank
            right_block = tl.load(right_rows + ranks[None, :], mask=mine[:, None] & live[None, :], other=0.0)
            right_block = narrow(right_block.to(tl.float32), factor.dtype.element_ty, UPCAST)
            if HAS_MASK:
                grad = dot(tl.trans(right_block), left_block, grad, PRECISION, UPCAST)
            else:
                grad = dot(tl.trans(left_block), right_block, grad, PRECISION, UPCAST)
    if NEED_GRAD:
        if HAS_MASK:
            grad = tl.trans(grad)
        plane = grads + split.to(tl.int64) * grad_split_stride + slot.to(tl.int64) * grad_slot_stride
        targets = plane + columns.to(tl.int64)[:, None] * grad_stride + ranks.to(tl.int64)[None, :] * grad_rank_stride
        tl.store(targets, grad * scaling, mask=inside[:, None] & live[None, :])


@triton.jit
def sum_planes_kernel(
    out, planes, multiplier, num_rows, num_columns, num_planes,
    out_row_stride, out_stride, plane_stride, plane_row_stride, plane_column_stride,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (M, N) = multiplier · Σ planes (P, M, N) in their order, rounded once."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    rows, columns = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    source = planes + rows * plane_row_stride + columns * plane_column_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for plane in range(num_planes):
        acc += tl.load(source + tl.cast(plane, tl.int64) * plane_stride, mask=mask, other=0.0)
    acc = narrow(acc * multiplier, out.dtype.element_ty, UPCAST)
    tl.store(out + rows * out_row_stride + columns * out_stride, acc, mask=mask)


@triton.jit
def add_low_rank(
    acc, g_rows, a_columns, rank, a_rank_stride,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + g · A; g_rows (BLOCK_M, 1) and a_columns (1, BLOCK_N) point at rank 0."""
    for r_begin in range(0, rank, BLOCK_R):
        ranks = r_begin + tl.arange(0, BLOCK_R)
        g_block = load_block(g_rows, ranks[None, :], 1, rank, False)
        a_block = load_block(a_columns, ranks[:, None], a_rank_stride, rank, False)
        acc = dot(g_block, a_block, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def dx_kernel(
    dx, dys, weights, dy_0, dy_1, dy_2, dy_3, weight_0, weight_1, weight_2, weight_3,
    g, lora_a, mask, row_slots, num_rows, in_features, widths, rank, num_groups,
    dx_row_stride, dx_stride, dy_row_strides, dy_strides, w_row_strides, w_strides, g_row_stride,
    a_slot_stride, a_rank_stride, a_stride, num_tiles_n,
    NUM_TERMS: tl.constexpr, HAS_MASK: tl.constexpr, MULTI: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """dx (M, in) = Σ dys[i] (M, widths[i]) · weights[i] (widths[i], in) + g (M, rank) · lora_a (rank, in), persistent.

    NUM_TERMS: entries of the tuples, 0 for the last term alone; more than one: projections that share their input.
    TMA: dy_i and weight_i are their descriptors, with blocks (BLOCK_M, BLOCK_K) and (BLOCK_K, BLOCK_N). MULTI: lora_a
    (slots, rank, in), row_slots int32 (M) names each row's slot, −1 for none; rows of other slots are selected away, so
    that an Inf in one adapter reaches no other's rows.
    """
    if TMA:
        dys, weights = (dy_0, dy_1, dy_2, dy_3), (weight_0, weight_1, weight_2, weight_3)
    num_tiles_m = tl.cdiv(num_rows, BLOCK_M)
    for tile in tl.range(tl.program_id(0), num_tiles_m * num_tiles_n, NUM_PROGRAMS, flatten=False):
        tile_m, tile_n = grouped_tile(tile, num_tiles_m, num_tiles_n, GROUP_M)
        first, begin = tile_m * BLOCK_M, tile_n * BLOCK_N
        rows, columns = first + tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N)
        read_rows = row_numbers(first, num_rows, BLOCK_M)
        read_columns = row_numbers(begin, in_features, BLOCK_N)
        g_rows = g + read_rows[:, None] * g_row_stride
        a_columns = lora_a + read_columns[None, :] * a_stride
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_MASK:
            acc = add_low_rank(acc, g_rows, a_columns, rank, a_rank_stride, LOW_PRECISION, UPCAST, BLOCK_R)
            acc = tl.where(keep_block(mask, read_rows, begin, num_groups, BLOCK_M, BLOCK_N), acc, 0.0)
        for i in tl.static_range(NUM_TERMS):
            if TMA:
                for k_begin in range(0, widths[i], BLOCK_K):
                    acc = dot(dys[i].load([first, k_begin]), weights[i].load([k_begin, begin]), acc, PRECISION, UPCAST)
            else:
                dy_rows = dys[i] + read_rows[:, None] * dy_row_strides[i]
                w_columns = weights[i] + read_columns[None, :] * w_strides[i]
                for k_begin in range(0, widths[i], BLOCK_K):
                    k = k_begin + tl.arange(0, BLOCK_K)
                    dy_block = load_block(dy_rows, k[None, :], dy_strides[i], widths[i], EVEN_K)
                    w_block = load_block(w_columns, k[:, None], w_row_strides[i], widths[i], EVEN_K)
                    acc = dot(dy_block, w_block, acc, PRECISION, UPCAST)
        if MULTI:
            slots = tl.load(row_slots + read_rows)
            for slot in range(tl.maximum(tl.min(slots, 0), 0), tl.max(slots, 0) + 1):
                mine = slots == slot
                if tl.sum(mine.to(tl.int32), 0) > 0:
                    slot_columns = a_columns + tl.cast(slot, tl.int64) * a_slot_stride
                    sum_ = add_low_rank(acc, g_rows, slot_columns, rank, a_rank_stride, LOW_PRECISION, UPCAST, BLOCK_R)
                    acc = tl.where(mine[:, None], sum_, acc)
        elif not HAS_MASK:
            acc = add_low_rank(acc, g_rows, a_columns, rank, a_rank_stride, LOW_PRECISION, UPCAST, BLOCK_R)
        store_rows(dx, acc, None, rows, columns, num_rows, in_features, dx_row_stride, dx_stride, 0, False, UPCAST)
