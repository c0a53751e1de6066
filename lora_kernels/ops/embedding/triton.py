"""``lora_embedding`` on Triton: rows of W and of the update gathered and added in one launch.

Backward: dB and dY B from one read of dY. dA gathers: the rows are sorted by id (on the device), and one program sums
each id's rows in their order, so that there are no atomics and the bits are the same each time.
"""

import torch
import triton

from .. import triton_host as host
from ..linear.triton_gradients import low_rank_of, skinny, sum_planes
from . import triton_kernels


def lora_embedding(ids, weight, lora_a, lora_b, scaling, batch_invariant):
    with torch.no_grad():
        (num_rows,), (num_embeddings, width), rank = ids.shape, weight.shape, lora_a.shape[0]
        y, ids = weight.new_empty((num_rows, width)), ids.contiguous()
        if y.numel() == 0:
            return y
        # The tile is the same for any number of rows, so batch_invariant asks for nothing more.
        block_m, block_n = 16, 32 if host.INTERPRETED else 64 if lora_a.dtype == torch.float32 else 128
        tiles_n = -(-width // block_n)
        triton_kernels.embedding_kernel[(-(-num_rows // block_m) * tiles_n,)](
            y, ids, weight, lora_a, lora_b, scaling, num_rows, num_embeddings, width, rank,
            *weight.stride(), *lora_a.stride(), *lora_b.stride(), tiles_n,
            PRECISION="ieee" if lora_a.dtype == torch.float32 else "tf32", UPCAST=host.upcast(weight, lora_a),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=16, num_warps=4, num_stages=2,
        )  # fmt: skip
        return y


def lora_embedding_backward(dy, ids, lora_a, lora_b, scaling, padding_idx, need_a, need_b):
    with torch.no_grad():
        num_rows, rank = dy.shape[0], lora_a.shape[0]
        da = torch.zeros_like(lora_a) if need_a else lora_a.new_empty(0)
        db = torch.zeros_like(lora_b) if need_b else lora_b.new_empty(0)
        if dy.numel() == 0 or not (need_a or need_b):
            return da, db
        # As float32, though it holds no more than A's dtype: with a narrow one ptxas serialises wgmma.
        right = lora_a.index_select(1, ids).t().float().contiguous() if need_b else None
        grads, lows = skinny(dy, lora_b.unsqueeze(0), scaling, right=right, need_low=need_a)
        if need_b:
            sum_planes(db, grads[:, 0])
        if need_a:
            g = low_rank_of(lows, num_rows, rank, torch.float32)
            sorted_ids, order = torch.sort(ids, stable=True)
            ends = torch.searchsorted(sorted_ids, sorted_ids, right=True)
            triton_kernels.scatter_kernel[(num_rows,)](
                da, g, sorted_ids, order, ends, lora_a.shape[1], rank, padding_idx, *da.stride(),
                UPCAST=host.upcast(da), BLOCK_R=triton.next_power_of_2(rank), num_warps=1,
            )  # fmt: skip
        return da, db


KERNELS = {"lora_embedding": lora_embedding, "lora_embedding_backward": lora_embedding_backward}


def _case(name, rank, dtype, adapter):
    def empty(*shape, like):
        return torch.empty(shape, dtype=like, device="meta")

    ids, dy = empty(8192, like=torch.int64), empty(8192, 4096, like=dtype)
    factors = (empty(rank, 128256, like=adapter), empty(4096, rank, like=adapter), empty(like=torch.float32))

    def call():
        lora_embedding(ids, empty(128256, 4096, like=dtype), *factors, False)
        lora_embedding_backward(dy, ids, *factors, 0, True, True)

    plain = adapter == torch.float32
    none = dict.fromkeys(("sum_planes_kernel", "scatter_kernel"), "none")
    mma = {"embedding_kernel": "none" if plain else "mma", "skinny_kernel": "none" if dtype == torch.float32 else "mma"}
    return host.StaticCase(f"lora_embedding {name} r{rank}", call, none | mma)


def STATIC_CASES():
    """Production sizes, for the static gate."""
    bf16, f32 = torch.bfloat16, torch.float32
    return [_case("bf16", 16, bf16, bf16), _case("bf16, adapters f32,", 16, bf16, f32), _case("f32", 64, f32, f32)]
