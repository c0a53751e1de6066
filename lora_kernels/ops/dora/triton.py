"""``row_norm`` on Triton: the lengths of the rows of ``W + s · B A`` in one read of W, for DoRA.

As in the reference each row is formed in float32 before it is squared: the closed form loses the digits of rows which
the update nearly cancels. Memory-bound: a program owns some rows and walks along them; A comes from the L2 cache.
"""

import functools

import torch
import triton
import triton.language as tl

from .. import triton_host as host
from ..merge.triton_kernels import product


@triton.jit
def row_norm_kernel(
    norm, weight, lora_a, lora_b, scaling, num_rows, num_columns, rank,
    row_stride, stride, a_row_stride, a_stride, b_row_stride, b_stride,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """norm (rows) float32; weight (rows, columns), lora_b (rows, R), lora_a (R, columns), any strides."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    in_rows = rows < num_rows
    scale = tl.load(scaling)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for begin in range(0, num_columns, BLOCK_N):
        columns = (begin + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_columns = columns < num_columns
        inside = in_rows[:, None] & in_columns[None, :]
        update = product(
            lora_b, lora_a, rows, columns, in_rows, in_columns, rank, b_row_stride, b_stride, a_row_stride, a_stride,
            PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        base = tl.load(weight + rows[:, None] * row_stride + columns[None, :] * stride, mask=inside, other=0.0)
        # Selected, as an Inf in B times the zero past the last column is NaN.
        value = tl.where(inside, base.to(tl.float32) + update * scale, 0.0)
        total += tl.sum(value * value, 1)
    tl.store(norm + rows, tl.sqrt_rn(total), mask=in_rows)


def row_norm(weight, lora_a, lora_b, scaling):
    with torch.no_grad():
        rows, columns = weight.shape
        norm = torch.empty(rows, dtype=torch.float32, device=weight.device)
        if rows == 0:
            return norm
        precision = "ieee" if torch.float32 in (lora_a.dtype, lora_b.dtype) else "tf32"
        # Elements apart need an address each: with products on the plain units a wider tile would spill.
        narrow = host.INTERPRETED or (precision == "ieee" and weight.stride(1) != 1)
        block_n = 32 if narrow else 64 if precision == "ieee" or weight.element_size() == 4 else 128
        block_r = min(16 if precision == "ieee" else 32, max(16, triton.next_power_of_2(lora_a.shape[0])))
        row_norm_kernel[(-(-rows // 16),)](
            norm, weight, lora_a, lora_b, scaling, rows, columns, lora_a.shape[0],
            *weight.stride(), *lora_a.stride(), *lora_b.stride(),
            PRECISION=precision, UPCAST=host.upcast(weight, lora_a, lora_b),
            BLOCK_M=16, BLOCK_N=block_n, BLOCK_R=block_r, num_warps=4, num_stages=3,
        )  # fmt: skip
        return norm


def _refused(weight, lora_a, lora_b, scaling):
    """The reference takes any floating dtype."""
    for name, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{name} is {tensor.dtype}; the kernel takes float32, float16 and bfloat16"
    return None


KERNELS = {"row_norm": row_norm}
REFUSED = {"row_norm": _refused}


def STATIC_CASES():
    """Production sizes, for the static gate; ``turned``: the weight of an embedding."""
    bf16, f32 = torch.bfloat16, torch.float32

    def case(name, rank, dtype, adapter, turned=False):
        def empty(*shape, like):
            return torch.empty(shape, dtype=like, device="meta")

        weight = empty(32000, 4096, like=dtype).t() if turned else empty(4096, 4096, like=dtype)
        factors = (empty(rank, weight.shape[1], like=adapter), empty(4096, rank, like=adapter), empty(like=f32))
        mma = "none" if f32 in (dtype, adapter) else "mma"
        return host.StaticCase(
            f"row_norm {name} r{rank}", functools.partial(row_norm, weight, *factors), {"row_norm_kernel": mma}
        )

    return [
        case("bf16", 16, bf16, bf16),
        case("bf16", 64, bf16, bf16),
        case("bf16, adapters f32,", 16, bf16, f32),
        case("f32", 16, f32, f32),
        case("bf16, adapters f32, turned,", 13, bf16, f32, turned=True),
    ]
