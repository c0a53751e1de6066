"""Device code of the multi-adapter ops: on each row the update of the adapter in that row's slot.

shrink     planes[split] = x Aᵀ over a split of K, for the rows that have a slot.
sum_planes h = the planes in their order; zero on base-only rows. For ``lora_shrink``.
expand     y += s · h Bᵀ, for ``lora_expand_`` and after a vendor's base product.
fused      base product of the rows in sorted order; the slots of a tile join its accumulator one after the other. Rows
           of other slots are kept by selection: 0 · Inf would be NaN.
decode     few rows, one launch: splits of the base product with the weight as the wide operand, and the shrink.
finish     adds the planes of ``decode`` in their order, the update, and the bias; rounds once.

A plan orders the rows by slot: ``segment_starts[slot + 1]`` is the first place of a slot in ``row_order``, base-only
rows come first. Segments are read on the device: grids are sized from what the host knows (rows, slots), a program
beyond the last tile returns at once, and nothing waits for the GPU.
"""

import triton
import triton.language as tl

from ..triton_math import dot, narrow
from ..triton_tiles import column_tile, grouped_tile, load_block, one_of, row_numbers, store_rows


@triton.jit
def slot_at(place, segment_starts, num_slots, BLOCK_SLOTS: tl.constexpr):
    """The slot of a place in the sorted order that is past the base-only rows."""
    slots = tl.arange(0, BLOCK_SLOTS)
    begins = tl.load(segment_starts + slots + 1, mask=slots < num_slots, other=2147483647)
    return tl.sum((begins <= place).to(tl.int32), 0) - 1


@triton.jit
def one_slot_tile(
    tile, segment_starts, num_slots, FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_SLOTS: tl.constexpr
):
    """(slot, first place, end place) of a tile of rows; none holds rows of two slots.

    FIRST: 0, or −1 to count the base-only rows as slot −1. The slot is ``num_slots`` where there is no such tile.
    """
    slots = tl.arange(0, BLOCK_SLOTS) + FIRST
    begins = tl.load(segment_starts + slots + 1, mask=slots < num_slots, other=0)
    ends = tl.load(segment_starts + slots + 2, mask=slots < num_slots, other=0)
    tiles = (ends - begins + BLOCK_M - 1) // BLOCK_M
    done = tl.cumsum(tiles, 0)
    slot = tl.sum((done <= tile).to(tl.int32), 0) + FIRST
    mine = slots == slot
    begin = tl.sum(tl.where(mine, begins + (tile - done + tiles) * BLOCK_M, 0), 0)
    end = tl.minimum(begin + BLOCK_M, tl.sum(tl.where(mine, ends, 0), 0))
    return tl.minimum(slot, num_slots), begin, end


@triton.jit
def slot_rank(
    ranks, slot, index, max_rank, slot_stride, slice_stride, HAS_RANKS: tl.constexpr, NUM_LISTED: tl.constexpr
):
    """Live rank of slice ``index`` (a number or a block of numbers) of a slot."""
    if NUM_LISTED > 0:
        rank = slot * 0 + index * 0 + ranks[0]
        for i in tl.static_range(1, NUM_LISTED):
            rank = tl.where(slot == i, ranks[i], rank)
        return rank
    elif HAS_RANKS:
        return tl.load(ranks + slot * slot_stride + index * slice_stride)
    else:
        return slot * 0 + index * 0 + max_rank


@triton.jit
def store_shrunk(
    planes, x, bank, ranks, row_order, segment_starts, tile, block_of_columns, split,
    num_rows, in_features, num_columns, max_rank, num_slots,
    x_row_stride, x_stride, a_slot_stride, a_slice_stride, a_row_stride, a_stride, rank_slot_stride, rank_slice_stride,
    HAS_RANKS: tl.constexpr, NUM_LISTED: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """planes[split, row, column] for the rows of one tile. A column is a (slice, rank) pair, ``max_rank`` a slice;
    beyond the live rank it is zero and nothing of A is read."""
    slot, begin, end = one_slot_tile(tile, segment_starts, num_slots, 0, BLOCK_M, BLOCK_SLOTS)
    if slot < num_slots:
        places = begin + tl.arange(0, BLOCK_M)
        rows = tl.load(row_order + places, mask=places < end, other=num_rows)
        mine = rows < num_rows
        columns = block_of_columns * BLOCK_H + tl.arange(0, BLOCK_H)
        known = columns < num_columns
        index, r = tl.where(known, columns // max_rank, 0), columns % max_rank
        rank = slot_rank(ranks, slot, index, max_rank, rank_slot_stride, rank_slice_stride, HAS_RANKS, NUM_LISTED)
        live = known & (r < rank)
        if NUM_LISTED > 0:
            first = index * rank
            offsets = (first + r).to(tl.int64) * in_features
        else:
            offsets = index.to(tl.int64) * a_slice_stride + r.to(tl.int64) * a_row_stride
        a_rows = one_of(bank, slot, a_slot_stride, NUM_LISTED) + tl.where(live, offsets, 0)
        x_rows = x + tl.where(mine, rows, 0).to(tl.int64) * x_row_stride
        h = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        share = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLIT) * BLOCK_K
        stop = tl.minimum((split + 1) * share, in_features)
        stop = tl.where(tl.sum(live.to(tl.int32), 0) > 0, stop, 0)
        for k_begin in range(split * share, stop, BLOCK_K):
            k = k_begin + tl.arange(0, BLOCK_K)
            x_block = load_block(x_rows[:, None], k[None, :], x_stride, in_features, EVEN_K)
            a_ptrs = a_rows[None, :] + k.to(tl.int64)[:, None] * a_stride
            if EVEN_K:
                a_block = tl.load(a_ptrs, mask=live[None, :], other=0.0)
            else:
                a_block = tl.load(a_ptrs, mask=live[None, :] & (k < in_features)[:, None], other=0.0)
            h = dot(x_block, a_block, h, PRECISION, UPCAST)
        # An Inf in x times the zero of a dead column is NaN.
        h = tl.where(live[None, :], h, 0.0)
        targets = planes + (split * num_rows + rows.to(tl.int64))[:, None] * num_columns + columns[None, :]
        tl.store(targets, h, mask=mine[:, None] & known[None, :])


@triton.jit
def add_update(
    acc, planes, bank, ranks, scalings, slot, index, rows, mine, columns, num_columns_b,
    num_rows, num_columns, max_rank, b_slot_stride, b_row_stride, b_stride, rank_slot_stride, rank_slice_stride,
    HAS_RANKS: tl.constexpr, NUM_LISTED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + s · h Bᵀ of one slot and slice; h is the sum of the planes in their order, s · h is rounded once, to the
    dtype of B."""
    rank = slot_rank(ranks, slot, index, max_rank, rank_slot_stride, rank_slice_stride, HAS_RANKS, NUM_LISTED)
    inside = columns < num_columns_b
    b_columns = tl.where(inside, columns, 0).to(tl.int64)
    if NUM_LISTED > 0:
        b_rows = one_of(bank, slot, b_slot_stride, NUM_LISTED) + b_columns * rank
    else:
        b_rows = one_of(bank, slot, b_slot_stride, NUM_LISTED) + b_columns * b_row_stride
    h_rows = planes + rows.to(tl.int64) * num_columns + index * max_rank
    scaling = tl.load(scalings + slot)
    # Not pipelined: few steps, and float32 planes of h in flight would fill the shared memory.
    for r_begin in tl.range(0, rank, BLOCK_R, num_stages=1):
        r = r_begin + tl.arange(0, BLOCK_R)
        live = r < rank
        b_ptrs = b_rows[None, :] + r.to(tl.int64)[:, None] * b_stride
        b_block = tl.load(b_ptrs, mask=live[:, None] & inside[None, :], other=0.0)
        h_ptrs = h_rows[:, None] + r[None, :]
        h = tl.load(h_ptrs, mask=mine[:, None] & live[None, :], other=0.0)
        for _ in tl.static_range(1, SPLIT):
            h_ptrs += num_rows * num_columns
            h += tl.load(h_ptrs, mask=mine[:, None] & live[None, :], other=0.0)
        acc = dot(narrow(h * scaling, b_block.dtype, UPCAST), b_block, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def multi_shrink_kernel(
    planes, x, bank, ranks, row_order, segment_starts, num_rows, in_features, num_columns, max_rank, num_slots,
    x_row_stride, x_stride, a_slot_stride, a_slice_stride, a_row_stride, a_stride, rank_slot_stride, rank_slice_stride,
    HAS_RANKS: tl.constexpr, NUM_LISTED: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of one slot, blocks of columns, SPLIT); planes float32 (SPLIT, M, S · max_rank)."""
    store_shrunk(
        planes, x, bank, ranks, row_order, segment_starts, tl.program_id(0), tl.program_id(1), tl.program_id(2),
        num_rows, in_features, num_columns, max_rank, num_slots, x_row_stride, x_stride,
        a_slot_stride, a_slice_stride, a_row_stride, a_stride, rank_slot_stride, rank_slice_stride,
        HAS_RANKS, NUM_LISTED, EVEN_K, SPLIT, LOW_PRECISION, UPCAST, BLOCK_M, BLOCK_H, BLOCK_K, BLOCK_SLOTS,
    )  # fmt: skip


@triton.jit
def sum_planes_kernel(
    h, planes, row_order, segment_starts, num_rows, num_columns,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """h (M, C) = the sum of planes (SPLIT, M, C); zero on the base-only rows, whose planes nobody wrote."""
    places = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(row_order + places, mask=places < num_rows, other=num_rows)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    shrunk = inside & (places >= tl.load(segment_starts + 1))[:, None]
    offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for _ in tl.static_range(SPLIT):
        total += tl.load(planes + offsets, mask=shrunk, other=0.0)
        planes += num_rows * num_columns
    tl.store(h + offsets, total, mask=inside)


@triton.jit
def multi_expand_kernel(
    y, planes, bank, ranks, scalings, row_order, segment_starts, num_rows, out_features, num_columns, max_rank,
    num_slots, y_row_stride, y_stride, b_slot_stride, b_row_stride, b_stride, rank_slot_stride, rank_slice_stride,
    WIDTHS: tl.constexpr, NUM_SLICES: tl.constexpr, HAS_RANKS: tl.constexpr, NUM_LISTED: tl.constexpr,
    SPLIT: tl.constexpr, LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """y += s · h Bᵀ in place; grid (tiles of one slot, tiles of columns). Base-only rows are not touched."""
    slot, first, stop = one_slot_tile(tl.program_id(0), segment_starts, num_slots, 0, BLOCK_M, BLOCK_SLOTS)
    if slot < num_slots:
        index, begin, end = column_tile(tl.program_id(1), out_features, WIDTHS, NUM_SLICES, BLOCK_N)
        places, columns = first + tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N)
        rows = tl.load(row_order + places, mask=places < stop, other=num_rows)
        acc = add_update(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32), planes, bank, ranks, scalings, slot, index, rows, rows < num_rows,
            columns, end, num_rows, num_columns, max_rank, b_slot_stride, b_row_stride, b_stride,
            rank_slot_stride, rank_slice_stride, HAS_RANKS, NUM_LISTED, SPLIT, LOW_PRECISION, UPCAST, BLOCK_R,
        )  # fmt: skip
        targets = y + rows.to(tl.int64)[:, None] * y_row_stride + columns.to(tl.int64)[None, :] * y_stride
        inside = (rows < num_rows)[:, None] & (columns < end)[None, :]
        acc += tl.load(targets, mask=inside, other=0.0).to(tl.float32)
        tl.store(targets, narrow(acc, y.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def multi_fused_kernel(
    y, x, weight, bias, planes, bank, ranks, scalings, row_order, segment_starts,
    num_rows, out_features, in_features, num_columns, max_rank, num_slots,
    y_row_stride, y_stride, x_row_stride, x_stride, w_row_stride, w_stride, bias_stride,
    b_slot_stride, b_row_stride, b_stride, rank_slot_stride, rank_slice_stride, num_tiles_n,
    WIDTHS: tl.constexpr, NUM_SLICES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RANKS: tl.constexpr,
    NUM_LISTED: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """One program a tile of y, rows in sorted order."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), num_tiles_n, GROUP_M)
    index, begin, end = column_tile(tile_n, out_features, WIDTHS, NUM_SLICES, BLOCK_N)
    places, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N)
    # Past the last place the last row again: it is not stored.
    rows = tl.load(row_order + row_numbers(tile_m * BLOCK_M, num_rows, BLOCK_M))
    x_rows = x + rows.to(tl.int64)[:, None] * x_row_stride
    w_rows = weight + row_numbers(begin, end, BLOCK_N)[None, :] * w_row_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k_begin in range(0, in_features, BLOCK_K):
        k = k_begin + tl.arange(0, BLOCK_K)
        x_block = load_block(x_rows, k[None, :], x_stride, in_features, EVEN_K)
        w_block = load_block(w_rows, k[:, None], w_stride, in_features, EVEN_K)
        acc = dot(x_block, w_block, acc, PRECISION, UPCAST)
    place = tl.maximum(tl.load(segment_starts + 1), tile_m * BLOCK_M)
    stop = tl.minimum(tl.minimum(tile_m * BLOCK_M + BLOCK_M, num_rows), tl.load(segment_starts + num_slots + 1))
    while place < stop:
        slot = slot_at(place, segment_starts, num_slots, BLOCK_SLOTS)
        segment_end = tl.load(segment_starts + slot + 2)
        mine = (places >= place) & (places < segment_end)
        updated = add_update(
            acc, planes, bank, ranks, scalings, slot, index, rows, mine, columns, end,
            num_rows, num_columns, max_rank, b_slot_stride, b_row_stride, b_stride, rank_slot_stride, rank_slice_stride,
            HAS_RANKS, NUM_LISTED, SPLIT, LOW_PRECISION, UPCAST, BLOCK_R,
        )  # fmt: skip
        acc = tl.where(mine[:, None], updated, acc)
        place = segment_end
    rows = tl.where(places < num_rows, rows, num_rows)
    store_rows(y, acc, bias, rows, columns, num_rows, end, y_row_stride, y_stride, bias_stride, HAS_BIAS, UPCAST)


@triton.jit
def multi_decode_kernel(
    base_planes, planes, x, weight, bank, ranks, row_order, segment_starts,
    num_rows, out_features, in_features, num_columns, max_rank, num_slots,
    x_row_stride, x_stride, w_row_stride, w_stride, a_slot_stride, a_slice_stride, a_row_stride, a_stride,
    rank_slot_stride, rank_slice_stride, num_shrink, num_column_blocks, num_tiles_n,
    HAS_RANKS: tl.constexpr, NUM_LISTED: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    BASE_SPLIT: tl.constexpr, PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SHRINK_M: tl.constexpr, BLOCK_H: tl.constexpr, SHRINK_K: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Programs 0 … num_shrink − 1 shrink; each of the others streams one slab of one tile of the weight.

    base_planes float32 (BASE_SPLIT, M, N); EVEN_K holds for BLOCK_K and for SHRINK_K.
    """
    program = tl.program_id(0)
    if program < num_shrink:
        tile = program // (num_column_blocks * SPLIT)
        store_shrunk(
            planes, x, bank, ranks, row_order, segment_starts, tile, program // SPLIT % num_column_blocks,
            program % SPLIT, num_rows, in_features, num_columns, max_rank, num_slots, x_row_stride, x_stride,
            a_slot_stride, a_slice_stride, a_row_stride, a_stride, rank_slot_stride, rank_slice_stride,
            HAS_RANKS, NUM_LISTED, EVEN_K, SPLIT, LOW_PRECISION, UPCAST, SHRINK_M, BLOCK_H, SHRINK_K, BLOCK_SLOTS,
        )  # fmt: skip
    else:
        program -= num_shrink
        split, tile_n = program % BASE_SPLIT, program // BASE_SPLIT % num_tiles_n
        first, begin = program // (BASE_SPLIT * num_tiles_n) * BLOCK_M, tile_n * BLOCK_N
        rows, columns = first + tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N)
        x_rows = x + row_numbers(first, num_rows, BLOCK_M)[None, :] * x_row_stride
        w_rows = weight + row_numbers(begin, out_features, BLOCK_N)[:, None] * w_row_stride
        share = tl.cdiv(tl.cdiv(in_features, BLOCK_K), BASE_SPLIT) * BLOCK_K
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k_begin in range(split * share, tl.minimum((split + 1) * share, in_features), BLOCK_K):
            k = k_begin + tl.arange(0, BLOCK_K)
            w_block = load_block(w_rows, k[None, :], w_stride, in_features, EVEN_K)
            x_block = load_block(x_rows, k[:, None], x_stride, in_features, EVEN_K)
            acc = dot(w_block, x_block, acc, PRECISION, UPCAST)
        targets = base_planes + (split * num_rows + rows).to(tl.int64)[None, :] * out_features + columns[:, None]
        tl.store(targets, acc, mask=(rows < num_rows)[None, :] & (columns < out_features)[:, None])


@triton.jit
def multi_finish_kernel(
    y, base_planes, planes, bias, bank, ranks, scalings, row_order, segment_starts,
    num_rows, out_features, num_columns, max_rank, num_slots, y_row_stride, y_stride, bias_stride,
    b_slot_stride, b_row_stride, b_stride, rank_slot_stride, rank_slice_stride,
    WIDTHS: tl.constexpr, NUM_SLICES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RANKS: tl.constexpr,
    NUM_LISTED: tl.constexpr, SPLIT: tl.constexpr, BASE_SPLIT: tl.constexpr, LOW_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """y = Σ base_planes + s · h Bᵀ + bias; grid (tiles of one slot or of base-only rows, tiles of columns)."""
    slot, first, stop = one_slot_tile(tl.program_id(0), segment_starts, num_slots, -1, BLOCK_M, BLOCK_SLOTS)
    if slot < num_slots:
        index, begin, end = column_tile(tl.program_id(1), out_features, WIDTHS, NUM_SLICES, BLOCK_N)
        places, columns = first + tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N)
        rows = tl.load(row_order + places, mask=places < stop, other=num_rows)
        inside = (rows < num_rows)[:, None] & (columns < end)[None, :]
        sources = base_planes + rows.to(tl.int64)[:, None] * out_features + columns[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for _ in tl.static_range(BASE_SPLIT):
            acc += tl.load(sources, mask=inside, other=0.0)
            sources += num_rows * out_features
        if slot >= 0:
            acc = add_update(
                acc, planes, bank, ranks, scalings, slot, index, rows, rows < num_rows, columns, end,
                num_rows, num_columns, max_rank, b_slot_stride, b_row_stride, b_stride,
                rank_slot_stride, rank_slice_stride, HAS_RANKS, NUM_LISTED, SPLIT, LOW_PRECISION, UPCAST, BLOCK_R,
            )  # fmt: skip
        store_rows(y, acc, bias, rows, columns, num_rows, end, y_row_stride, y_stride, bias_stride, HAS_BIAS, UPCAST)
