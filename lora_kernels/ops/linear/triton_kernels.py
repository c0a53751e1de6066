"""Device code of ``lora_linear`` and ``lora_add_``: Y = X Wᵀ + bias + s · (X Aᵀ) Bᵀ.

one_pass   one launch. x Wᵀ and x Aᵀ grow in one K loop from the same x tile; then h meets B in registers.
shrink     U = s · X Aᵀ for all slices; the scale is applied to h in float32, U is rounded once.
two_pass   after shrink: a persistent GEMM whose last K steps are U Bᵀ, into the same accumulator. TMA descriptors
           where the tensors allow; the wait for shrink (programmatic dependent launch) comes after the K loop.
decode     few rows: Wᵀ tiles are the wide operand, tokens the narrow one. y is linear in slabs of K, so each split of
           K carries its own part of h through B: no split waits for another. Then
sum_splits adds the planes of the splits in their order: no atomics, the same bits each time.
expand     y += U Bᵀ for lora_add_.
Rows and offsets are int64: a tensor may have more than 2³¹ elements.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..triton_math import dot, narrow
from ..triton_tiles import column_tile, grouped_tile, keep_block, load_block, one_of, row_numbers, store_rows


@triton.jit
def one_pass_kernel(
    y, x, weight, bias, lora_a, lora_b, scaling, num_rows, out_features, in_features, rank,
    y_row_stride, y_stride, x_row_stride, x_stride, w_row_stride, w_stride, bias_stride,
    a_slice_stride, a_row_stride, a_stride, b_row_stride, b_stride, num_tiles_n,
    WIDTHS: tl.constexpr, NUM_SLICES: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """x (M, K), weight (N, K), lora_a (S, R, K), lora_b (N, R), R <= BLOCK_R; one program a tile of y."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), num_tiles_n, GROUP_M)
    index, begin, end = column_tile(tile_n, out_features, WIDTHS, NUM_SLICES, BLOCK_N)
    rows, columns, ranks = (
        tile_m * BLOCK_M + tl.arange(0, BLOCK_M),
        begin + tl.arange(0, BLOCK_N),
        tl.arange(0, BLOCK_R),
    )
    x_rows = x + row_numbers(tile_m * BLOCK_M, num_rows, BLOCK_M)[:, None] * x_row_stride
    w_rows = weight + row_numbers(begin, end, BLOCK_N)[None, :] * w_row_stride
    a_rows = lora_a + index * a_slice_stride + row_numbers(0, rank, BLOCK_R)[None, :] * a_row_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k_begin in range(0, in_features, BLOCK_K):
        k = k_begin + tl.arange(0, BLOCK_K)
        x_block = load_block(x_rows, k[None, :], x_stride, in_features, EVEN_K)
        w_block = load_block(w_rows, k[:, None], w_stride, in_features, EVEN_K)
        a_block = load_block(a_rows, k[:, None], a_stride, in_features, EVEN_K)
        acc = dot(x_block, w_block, acc, PRECISION, UPCAST)
        h = dot(x_block, a_block, h, LOW_PRECISION, UPCAST)
    # Ranks past the end repeat the last row of A: select zero here, so that one mask serves A and B.
    u = tl.where((ranks < rank)[None, :], h * tl.load(scaling), 0.0)
    b_rows = lora_b + row_numbers(begin, end, BLOCK_N)[None, :] * b_row_stride
    b_block = load_block(b_rows, ranks[:, None], b_stride, rank, False)
    acc = dot(narrow(u, b_block.dtype, UPCAST), b_block, acc, LOW_PRECISION, UPCAST)
    store_rows(y, acc, bias, rows, columns, num_rows, end, y_row_stride, y_stride, bias_stride, HAS_BIAS, UPCAST)


@triton.jit
def stacked_slice(lora_a, ranks, scaling, index, rank, a_slice_stride, NUM_LISTED: tl.constexpr):
    """(where A begins, rank, columns of h before it, scaling) of slice ``index``, a block of numbers; NUM_LISTED > 0:
    of a projection of its own, lora_a, ranks and scaling being tuples."""
    begin = one_of(lora_a, index, a_slice_stride, NUM_LISTED)
    if NUM_LISTED == 0:
        return begin, rank, index * rank, tl.load(scaling)
    else:
        own_rank, before, total = index * 0 + ranks[0], index * 0, ranks[0]
        scale = index * 0.0 + tl.load(scaling[0])
        for i in tl.static_range(1, NUM_LISTED):
            own_rank = tl.where(index == i, ranks[i], own_rank)
            before = tl.where(index == i, total, before)
            scale = tl.where(index == i, tl.load(scaling[i]), scale)
            total += ranks[i]
        return begin, own_rank, before, scale[None, :]


@triton.jit
def shrink_kernel(
    u, x, lora_a, ranks, scaling, num_rows, in_features, num_ranks, rank, padded_rank,
    u_row_stride, x_row_stride, x_stride, a_slice_stride, a_row_stride, a_stride,
    saved_h, h_row_stride, mask, multiplier,
    EVEN_K: tl.constexpr, NUM_LISTED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """u (M, S · padded_rank) = s · h, the padding columns zero; h = x (M, K) · lora_a (S, R, K)ᵀ. NUM_LISTED: each
    slice is a projection of its own, see stacked_slice.

    Training: saved_h (M, S · R) float32 is written too; mask, packed keep bits of x, and multiplier make h that of
    dropout(x). Each is None otherwise.
    """
    if PDL:
        gdc_launch_dependents()
    first = tl.program_id(0) * BLOCK_M
    places = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    index, r = places // padded_rank, places % padded_rank
    index = tl.where(places < num_ranks, index, 0)
    a_begin, own_rank, before, scale = stacked_slice(lora_a, ranks, scaling, index, rank, a_slice_stride, NUM_LISTED)
    live = (places < num_ranks) & (r < own_rank)
    a_rows = (a_begin + tl.where(live, r.to(tl.int64) * a_row_stride, 0))[None, :]
    x_rows = x + row_numbers(first, num_rows, BLOCK_M)[:, None] * x_row_stride
    h = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for k_begin in range(0, in_features, BLOCK_K):
        k = k_begin + tl.arange(0, BLOCK_K)
        x_block = load_block(x_rows, k[None, :], x_stride, in_features, EVEN_K)
        a_block = load_block(a_rows, k[:, None], a_stride, in_features, EVEN_K)
        if mask is not None:
            read_rows, num_groups = row_numbers(first, num_rows, BLOCK_M), tl.cdiv(in_features, 8)
            x_block = tl.where(keep_block(mask, read_rows, k_begin, num_groups, BLOCK_M, BLOCK_K), x_block, 0.0)
        h = dot(x_block, a_block, h, PRECISION, UPCAST)
    rows = first + tl.arange(0, BLOCK_M)
    if mask is not None:
        h *= multiplier
    if saved_h is not None:
        h_rows = saved_h + rows.to(tl.int64)[:, None] * h_row_stride
        tl.store(h_rows + (before + r)[None, :], h, mask=(rows < num_rows)[:, None] & live[None, :])
    h = narrow(tl.where(live[None, :], h * scale, 0.0), u.dtype.element_ty, UPCAST)
    targets = u + rows.to(tl.int64)[:, None] * u_row_stride + places[None, :]
    tl.store(targets, h, mask=(rows < num_rows)[:, None] & (places < num_ranks)[None, :])


@triton.jit
def two_pass_tile(
    x, weight, u, lora_b, first, begin, end, u_begin, num_rows, in_features, rank, padded_rank,
    x_row_stride, x_stride, w_row_stride, w_stride, u_row_stride, b_row_stride, b_stride,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
    PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sums of rows first … and columns begin … end: x · weightᵀ, then columns u_begin … of u · lora_bᵀ. TMA: x, weight
    and u are descriptors with blocks (BLOCK_M, BLOCK_K), (BLOCK_N, BLOCK_K) and (BLOCK_M, BLOCK_R); else pointers."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        for k_begin in range(0, in_features, BLOCK_K):
            acc = dot(x.load([first, k_begin]), weight.load([begin, k_begin]).T, acc, PRECISION, UPCAST)
    else:
        x_rows = x + row_numbers(first, num_rows, BLOCK_M)[:, None] * x_row_stride
        w_rows = weight + row_numbers(begin, end, BLOCK_N)[None, :] * w_row_stride
        for k_begin in range(0, in_features, BLOCK_K):
            k = k_begin + tl.arange(0, BLOCK_K)
            x_block = load_block(x_rows, k[None, :], x_stride, in_features, EVEN_K)
            w_block = load_block(w_rows, k[:, None], w_stride, in_features, EVEN_K)
            acc = dot(x_block, w_block, acc, PRECISION, UPCAST)
    if PDL:
        gdc_wait()
    b_rows = lora_b + row_numbers(begin, end, BLOCK_N)[None, :] * b_row_stride
    for r_begin in range(0, padded_rank, BLOCK_R):
        ranks = r_begin + tl.arange(0, BLOCK_R)
        b_block = load_block(b_rows, ranks[:, None], b_stride, rank, False)
        if TMA:
            u_block = u.load([first, u_begin + r_begin])
        else:
            u_rows = u + row_numbers(first, num_rows, BLOCK_M)[:, None] * u_row_stride + u_begin
            u_block = tl.load(u_rows + ranks[None, :])
        acc = dot(u_block, b_block, acc, LOW_PRECISION, UPCAST)
    return acc


@triton.jit
def two_pass_kernel(
    y, x, weight, u, bias, lora_b, num_rows, out_features, in_features, rank, padded_rank,
    y_row_stride, y_stride, x_row_stride, x_stride, w_row_stride, w_stride, u_row_stride, bias_stride,
    b_row_stride, b_stride, num_tiles_n,
    WIDTHS: tl.constexpr, NUM_SLICES: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    PDL: tl.constexpr, PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Persistent; operands as two_pass_tile. u (M, S · padded_rank) is scaled h."""
    num_tiles_m = tl.cdiv(num_rows, BLOCK_M)
    for tile in tl.range(tl.program_id(0), num_tiles_m * num_tiles_n, NUM_PROGRAMS, flatten=False):
        tile_m, tile_n = grouped_tile(tile, num_tiles_m, num_tiles_n, GROUP_M)
        index, begin, end = column_tile(tile_n, out_features, WIDTHS, NUM_SLICES, BLOCK_N)
        first = tile_m * BLOCK_M
        rows, columns = first + tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N)
        acc = two_pass_tile(
            x, weight, u, lora_b, first, begin, end, index * padded_rank, num_rows, in_features, rank, padded_rank,
            x_row_stride, x_stride, w_row_stride, w_stride, u_row_stride, b_row_stride, b_stride,
            EVEN_K, TMA, PDL, PRECISION, LOW_PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        store_rows(y, acc, bias, rows, columns, num_rows, end, y_row_stride, y_stride, bias_stride, HAS_BIAS, UPCAST)


@triton.jit
def decode_tile(
    x, weight, lora_a, lora_b, scaling, begin, end, split, num_rows, in_features, rank,
    x_row_stride, x_stride, w_row_stride, w_stride, a_row_stride, a_stride, b_row_stride, b_stride,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_M): columns begin … end of all rows, of one split of K. num_rows <= BLOCK_M, rank <= BLOCK_R."""
    ranks = tl.arange(0, BLOCK_R)
    x_rows = x + row_numbers(0, num_rows, BLOCK_M)[None, :] * x_row_stride
    w_rows = weight + row_numbers(begin, end, BLOCK_N)[:, None] * w_row_stride
    a_rows = lora_a + row_numbers(0, rank, BLOCK_R)[:, None] * a_row_stride
    share = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLIT) * BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    h = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for k_begin in range(split * share, tl.minimum((split + 1) * share, in_features), BLOCK_K):
        k = k_begin + tl.arange(0, BLOCK_K)
        w_block = load_block(w_rows, k[None, :], w_stride, in_features, EVEN_K)
        x_block = load_block(x_rows, k[:, None], x_stride, in_features, EVEN_K)
        a_block = load_block(a_rows, k[None, :], a_stride, in_features, EVEN_K)
        acc = dot(w_block, x_block, acc, PRECISION, UPCAST)
        h = dot(a_block, x_block, h, LOW_PRECISION, UPCAST)
    u = tl.where((ranks < rank)[:, None], h * tl.load(scaling), 0.0)
    b_rows = lora_b + row_numbers(begin, end, BLOCK_N)[:, None] * b_row_stride
    b_block = load_block(b_rows, ranks[None, :], b_stride, rank, False)
    return dot(b_block, narrow(u, b_block.dtype, UPCAST), acc, LOW_PRECISION, UPCAST)


@triton.jit
def decode_kernel(
    y, planes, x, weight, bias, lora_a, lora_b, scaling, num_rows, out_features, in_features, rank,
    y_row_stride, y_stride, x_row_stride, x_stride, w_row_stride, w_stride, bias_stride,
    a_slice_stride, a_row_stride, a_stride, b_row_stride, b_stride,
    WIDTHS: tl.constexpr, NUM_SLICES: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
    PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """num_rows <= BLOCK_M, rank <= BLOCK_R. SPLIT 1 writes y; else planes[split] (SPLIT, M, N) float32."""
    if PDL:
        gdc_launch_dependents()
    index, begin, end = column_tile(tl.program_id(0), out_features, WIDTHS, NUM_SLICES, BLOCK_N)
    split = tl.program_id(1)
    rows, columns = tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N)
    acc = decode_tile(
        x, weight, lora_a + index * a_slice_stride, lora_b, scaling, begin, end, split, num_rows, in_features, rank,
        x_row_stride, x_stride, w_row_stride, w_stride, a_row_stride, a_stride, b_row_stride, b_stride,
        EVEN_K, PRECISION, LOW_PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, SPLIT,
    )  # fmt: skip
    if SPLIT == 1:
        store_rows(y, tl.trans(acc), bias, rows, columns, num_rows, end, y_row_stride, y_stride, bias_stride,
                   HAS_BIAS, UPCAST)  # fmt: skip
    else:
        plane = planes + split.to(tl.int64) * num_rows * out_features
        targets = plane + rows[None, :].to(tl.int64) * out_features + columns[:, None]
        tl.store(targets, acc, mask=(rows < num_rows)[None, :] & (columns < end)[:, None])


@triton.jit
def sum_splits_kernel(
    y, planes, bias, num_rows, out_features, y_row_stride, y_stride, bias_stride,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr, UPCAST: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (M, N) = Σ planes (SPLIT, M, N) in their order, + bias."""
    if PDL:
        gdc_wait()
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = rows.to(tl.int64)[:, None] * out_features + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < out_features)[None, :]
    acc = tl.load(planes + places, mask=mask, other=0.0)
    plane_size = tl.cast(num_rows, tl.int64) * out_features
    for split in tl.static_range(1, SPLIT):
        acc += tl.load(planes + split * plane_size + places, mask=mask, other=0.0)
    store_rows(
        y, acc, bias, rows, columns, num_rows, out_features, y_row_stride, y_stride, bias_stride, HAS_BIAS, UPCAST
    )


@triton.jit
def expand_kernel(
    y, u, lora_b, num_rows, out_features, rank, padded_rank,
    y_row_stride, y_stride, u_row_stride, b_row_stride, b_stride, num_tiles_n,
    PDL: tl.constexpr, LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y (M, N) += u (M, padded_rank) · lora_b (N, R)ᵀ, in the dtype of y."""
    if PDL:
        gdc_wait()
    tile = tl.program_id(0)
    first, begin = (tile // num_tiles_n) * BLOCK_M, (tile % num_tiles_n) * BLOCK_N
    rows, columns = first + tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N)
    targets = y + rows.to(tl.int64)[:, None] * y_row_stride + columns.to(tl.int64)[None, :] * y_stride
    mask = (rows < num_rows)[:, None] & (columns < out_features)[None, :]
    acc = tl.load(targets, mask=mask, other=0.0).to(tl.float32)
    u_rows = u + row_numbers(first, num_rows, BLOCK_M)[:, None] * u_row_stride
    b_rows = lora_b + row_numbers(begin, out_features, BLOCK_N)[None, :] * b_row_stride
    for r_begin in range(0, padded_rank, BLOCK_R):
        ranks = r_begin + tl.arange(0, BLOCK_R)
        u_block = tl.load(u_rows + ranks[None, :])
        b_block = load_block(b_rows, ranks[:, None], b_stride, rank, False)
        acc = dot(u_block, b_block, acc, LOW_PRECISION, UPCAST)
    tl.store(targets, narrow(acc, y.dtype.element_ty, UPCAST), mask=mask)
