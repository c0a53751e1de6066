"""Device code of ``grouped_lora_linear``: projections that share x in one launch, many rows (after the shrink of all)
and few."""

import triton
import triton.language as tl

from ..linear.triton_kernels import decode_tile, two_pass_tile
from ..triton_tiles import grouped_tile, store_rows


@triton.jit
def grouped_kernel(
    ys, x, weights, weight_0, weight_1, weight_2, weight_3, u, biases, lora_bs,
    num_rows, in_features, widths, ranks, padded_rank,
    y_row_strides, y_strides, x_row_stride, x_stride, w_row_strides, w_strides, u_row_stride, bias_strides,
    b_row_strides, b_strides,
    NUM_LISTED: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
    PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """ys[i] (M, widths[i]) = x · weights[i]ᵀ + biases[i] + the i-th padded_rank columns of u · lora_bs[i]ᵀ.

    Persistent: NUM_PROGRAMS, or one a tile where there are fewer. The tiles are numbered through all NUM_LISTED
    projections, so that no projection ends with a wave of its own that is not full; operands as two_pass_tile, weight_i
    being the descriptor of weights[i].
    """
    if TMA:
        weights = (weight_0, weight_1, weight_2, weight_3)
    num_tiles_m = tl.cdiv(num_rows, BLOCK_M)
    start = tl.program_id(0)
    for i in tl.static_range(NUM_LISTED):
        num_tiles_n = tl.cdiv(widths[i], BLOCK_N)
        num_tiles = num_tiles_m * num_tiles_n
        for tile in tl.range(start, num_tiles, NUM_PROGRAMS, flatten=False):
            tile_m, tile_n = grouped_tile(tile, num_tiles_m, num_tiles_n, GROUP_M)
            first, begin = tile_m * BLOCK_M, tile_n * BLOCK_N
            rows, columns = first + tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N)
            acc = two_pass_tile(
                x, weights[i], u, lora_bs[i], first, begin, widths[i], i * padded_rank, num_rows, in_features,
                ranks[i], padded_rank, x_row_stride, x_stride, w_row_strides[i], w_strides[i], u_row_stride,
                b_row_strides[i], b_strides[i],
                EVEN_K, TMA, PDL, PRECISION, LOW_PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
            store_rows(ys[i], acc, biases[i], rows, columns, num_rows, widths[i], y_row_strides[i], y_strides[i],
                       bias_strides[i], HAS_BIAS, UPCAST)  # fmt: skip
        start = (start + NUM_PROGRAMS - num_tiles % NUM_PROGRAMS) % NUM_PROGRAMS


@triton.jit
def grouped_decode_kernel(
    ys, x, weights, biases, lora_as, lora_bs, scalings, num_rows, in_features, widths, ranks,
    y_row_strides, y_strides, x_row_stride, x_stride, w_row_strides, w_strides, bias_strides,
    a_row_strides, a_strides, b_row_strides, b_strides,
    NUM_LISTED: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """ys[i] (M, widths[i]) = x · weights[i]ᵀ + biases[i] + scalings[i] · (x · lora_as[i]ᵀ) · lora_bs[i]ᵀ, as
    decode_kernel; one program a tile of columns, those of all NUM_LISTED projections in one row."""
    tile = tl.program_id(0)
    for i in tl.static_range(NUM_LISTED):
        num_tiles = tl.cdiv(widths[i], BLOCK_N)
        if (tile >= 0) & (tile < num_tiles):
            begin = tile * BLOCK_N
            acc = decode_tile(
                x, weights[i], lora_as[i], lora_bs[i], scalings[i], begin, widths[i], 0, num_rows, in_features,
                ranks[i], x_row_stride, x_stride, w_row_strides[i], w_strides[i], a_row_strides[i], a_strides[i],
                b_row_strides[i], b_strides[i],
                EVEN_K, PRECISION, LOW_PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, 1,
            )  # fmt: skip
            store_rows(ys[i], tl.trans(acc), biases[i], tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N), num_rows,
                       widths[i], y_row_strides[i], y_strides[i], bias_strides[i], HAS_BIAS, UPCAST)  # fmt: skip
        tile -= num_tiles
