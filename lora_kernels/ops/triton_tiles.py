"""What the device code of several families is built of: the tile of a program, reads past an edge, the last store."""

import triton
import triton.language as tl

from .triton_math import narrow


@triton.jit
def column_tile(tile, num_columns, WIDTHS: tl.constexpr, NUM_SLICES: tl.constexpr, BLOCK_N: tl.constexpr):
    """(slice, first column, end column) of a tile of columns; none holds columns of two slices."""
    if NUM_SLICES == 0:
        return 0, tile * BLOCK_N, num_columns
    else:
        index, begin, end, tiles_before, columns_before = 0, 0, 0, 0, 0
        for i in tl.static_range(NUM_SLICES):
            tiles = (WIDTHS[i] + BLOCK_N - 1) // BLOCK_N
            inside = (tile >= tiles_before) & (tile < tiles_before + tiles)
            index = tl.where(inside, i, index)
            begin = tl.where(inside, columns_before + (tile - tiles_before) * BLOCK_N, begin)
            end = tl.where(inside, columns_before + WIDTHS[i], end)
            tiles_before += tiles
            columns_before += WIDTHS[i]
        return index, begin, end


@triton.jit
def grouped_tile(tile, num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """(tile of rows, tile of columns): GROUP_M tiles of rows share each tile of the weight in L2."""
    group = tile // (GROUP_M * num_tiles_n)
    first = group * GROUP_M
    height = tl.minimum(num_tiles_m - first, GROUP_M)
    inside = tile % (GROUP_M * num_tiles_n)
    return first + inside % height, inside // height


@triton.jit
def load_block(rows, columns, stride, num_columns, EVEN: tl.constexpr):
    """A block at row pointers (…, 1) or (1, …) and column numbers of the other shape; zero past the last column."""
    if EVEN:
        return tl.load(rows + columns.to(tl.int64) * stride)
    else:
        return tl.load(rows + columns.to(tl.int64) * stride, mask=columns < num_columns, other=0.0)


@triton.jit
def row_numbers(first, count, BLOCK: tl.constexpr):
    """Row numbers of a block; past the end the last row again, whose results are not stored."""
    return tl.minimum(first + tl.arange(0, BLOCK), count - 1).to(tl.int64)


@triton.jit
def one_of(bank, index, stride, NUM_LISTED: tl.constexpr):
    """Where matrix ``index`` (a number or a block of numbers) begins: a place in the bank, or (NUM_LISTED > 0) one of a
    tuple of tensors."""
    if NUM_LISTED == 0:
        return bank + index.to(tl.int64) * stride
    else:
        address = index.to(tl.int64) * 0 + bank[0].to(tl.int64)
        for i in tl.static_range(1, NUM_LISTED):
            address = tl.where(index == i, bank[i].to(tl.int64), address)
        return tl.multiple_of(address, 16).to(bank[0].dtype)


@triton.jit
def keep_block(mask, rows, begin, num_groups, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout's packed bits of columns begin … begin + BLOCK_N of some rows; ``begin`` is a multiple of 8."""
    groups = begin // 8 + tl.arange(0, BLOCK_N // 8)
    places = rows.to(tl.int64)[:, None] * num_groups + groups[None, :]
    packed = tl.load(mask + places, mask=(groups < num_groups)[None, :], other=0).to(tl.int32)
    bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_M, BLOCK_N)) != 0


@triton.jit
def store_rows(y, acc, bias, rows, columns, num_rows, end, y_row_stride, y_stride, bias_stride,
               HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Adds the bias and rounds once."""
    if HAS_BIAS:
        acc += tl.load(bias + columns.to(tl.int64) * bias_stride, mask=columns < end, other=0.0).to(tl.float32)[None, :]
    targets = y + rows.to(tl.int64)[:, None] * y_row_stride + columns.to(tl.int64)[None, :] * y_stride
    tl.store(
        targets, narrow(acc, y.dtype.element_ty, UPCAST), mask=(rows < num_rows)[:, None] & (columns < end)[None, :]
    )
