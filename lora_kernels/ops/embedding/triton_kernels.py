"""Device code of ``lora_embedding``: gather with the update, and the gradient of A by segments of equal ids."""

import triton
import triton.language as tl

from ..triton_math import dot, narrow


@triton.jit
def embedding_kernel(
    y, ids, weight, lora_a, lora_b, scaling, num_rows, num_embeddings, width, rank,
    w_row_stride, w_stride, a_row_stride, a_stride, b_row_stride, b_stride, num_tiles_n,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y (M, width) = weight[ids] + s · lora_a[:, ids]ᵀ lora_bᵀ; NaN, and nothing read, where an id is out of range."""
    tile = tl.program_id(0)
    rows = tile // num_tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile % num_tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_rows, in_columns = rows < num_rows, columns < width
    wanted = tl.load(ids + rows, mask=in_rows, other=0)
    known = (wanted >= 0) & (wanted < num_embeddings)
    place = tl.where(known, wanted, 0).to(tl.int64)
    update = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r_begin in range(0, rank, BLOCK_R):
        r = (r_begin + tl.arange(0, BLOCK_R)).to(tl.int64)
        live = r < rank
        a_ptrs = lora_a + place[:, None] * a_stride + r[None, :] * a_row_stride
        b_ptrs = lora_b + columns[None, :] * b_row_stride + r[:, None] * b_stride
        a_block = tl.load(a_ptrs, mask=(in_rows & known)[:, None] & live[None, :], other=0.0)
        b_block = tl.load(b_ptrs, mask=live[:, None] & in_columns[None, :], other=0.0)
        update = dot(a_block, b_block, update, PRECISION, UPCAST)
    inside = in_rows[:, None] & in_columns[None, :]
    w_ptrs = weight + place[:, None] * w_row_stride + columns[None, :] * w_stride
    base = tl.load(w_ptrs, mask=inside & known[:, None], other=float("nan"))
    value = narrow(base.to(tl.float32) + update * tl.load(scaling), y.dtype.element_ty, UPCAST)
    tl.store(y + rows.to(tl.int64)[:, None] * width + columns[None, :], value, mask=inside)


@triton.jit
def scatter_kernel(
    da, g, sorted_ids, order, ends, num_embeddings, rank, padding_idx, a_row_stride, a_stride,
    UPCAST: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """da[:, v] = Σ g[m] over the rows m of id v, in their order. One program a place of the sorted ids; only that of
    the first place of an id works. g (M, R) float32; ``ends``: the place after the last of the same id."""
    place = tl.program_id(0)
    wanted = tl.load(sorted_ids + place)
    before = tl.load(sorted_ids + place - 1, mask=place > 0, other=-1)
    if (wanted != before) & (wanted != padding_idx) & (wanted >= 0) & (wanted < num_embeddings):
        ranks = tl.arange(0, BLOCK_R)
        live = ranks < rank
        total = tl.zeros((BLOCK_R,), tl.float32)
        for at in range(place, tl.load(ends + place).to(tl.int32)):
            total += tl.load(g + tl.load(order + at) * rank + ranks, mask=live, other=0.0)
        targets = da + ranks.to(tl.int64) * a_row_stride + wanted * a_stride
        tl.store(targets, narrow(total, da.dtype.element_ty, UPCAST), mask=live)
