"""Device code of ``merge_``, ``switch_`` and ``merge_is_finite``: W + Σ scale · B A, read once and written once.

Memory-bound: a program owns one tile of the weight, makes its update in float32 and rounds once. Any strides: a weight
stored by columns comes in transposed, with Aᵀ as the left factor.
"""

import triton
import triton.language as tl

from ..triton_math import dot, narrow


@triton.jit
def product(
    left, right, rows, columns, in_rows, in_columns, rank, left_row_stride, left_stride, right_row_stride, right_stride,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """left (…, R) · right (R, …) for one tile, float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r_begin in range(0, rank, BLOCK_R):
        r = (r_begin + tl.arange(0, BLOCK_R)).to(tl.int64)
        left_ptrs = left + rows[:, None] * left_row_stride + r[None, :] * left_stride
        right_ptrs = right + r[:, None] * right_row_stride + columns[None, :] * right_stride
        left_block = tl.load(left_ptrs, mask=in_rows[:, None] & (r < rank)[None, :], other=0.0)
        right_block = tl.load(right_ptrs, mask=(r < rank)[:, None] & in_columns[None, :], other=0.0)
        acc = dot(left_block, right_block, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def merge_kernel(
    weight, finite, left, right, scaling, new_left, new_right, new_scaling, num_rows, num_columns, rank, new_rank, sign,
    row_stride, stride, left_row_stride, left_stride, right_row_stride, right_stride,
    new_left_row_stride, new_left_stride, new_right_row_stride, new_right_stride, num_tiles_n,
    SWITCH: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr, NEW_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    NEW_BLOCK_R: tl.constexpr,
):  # fmt: skip
    """weight += sign · s · left right (+ the new adapter's product); CHECK: writes 0 to ``finite`` where the result
    would hold Inf or NaN, and nothing else. All programs that write it write the same value."""
    tile = tl.program_id(0)
    first_row, first_column = tile // num_tiles_n * BLOCK_M, tile % num_tiles_n * BLOCK_N
    rows = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (first_column + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_rows, in_columns = rows < num_rows, columns < num_columns
    update = product(
        left, right, rows, columns, in_rows, in_columns, rank, left_row_stride, left_stride, right_row_stride,
        right_stride, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    update *= sign * tl.load(scaling)
    if SWITCH:
        new = product(
            new_left, new_right, rows, columns, in_rows, in_columns, new_rank, new_left_row_stride, new_left_stride,
            new_right_row_stride, new_right_stride, NEW_PRECISION, UPCAST, BLOCK_M, BLOCK_N, NEW_BLOCK_R,
        )  # fmt: skip
        update += new * tl.load(new_scaling)
    inside = in_rows[:, None] & in_columns[None, :]
    targets = weight + rows[:, None] * row_stride + columns[None, :] * stride
    merged = narrow(tl.load(targets, mask=inside, other=0.0).to(tl.float32) + update, weight.dtype.element_ty, UPCAST)
    if CHECK:
        # x - x is zero, but for Inf and NaN. No reduction: Triton 3.7 can not compile one here for sm_100.
        value = merged.to(tl.float32)
        flags = finite + tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        tl.store(flags, tl.zeros((BLOCK_M, BLOCK_N), tl.uint8), mask=inside & (value - value != 0.0))
    else:
        tl.store(targets, merged, mask=inside)
