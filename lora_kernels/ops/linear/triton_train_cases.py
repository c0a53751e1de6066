"""Calls of training, of production size, that reach every tile size and switch of its kernels: for the static gate."""

import functools

import torch

from ..multi import triton_train as multi
from ..triton_host import StaticCase
from . import triton_train
from .triton_cases import arguments

# (rows, rank): each tile size of input_gradient, a narrow and the widest block of ranks.
_SIZES = ((32, 16), (400, 16), (8192, 16), (8192, 64))
_SLICES = [4096, 1024, 1024]


def _empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def _mma(rows, dtype):
    """The big GEMMs of half precision go to the wide instruction; what only draws or sums has none."""
    none = dict.fromkeys(("draw_kernel", "sum_planes_kernel"), "none")
    if dtype == torch.float32:
        return none | dict.fromkeys(("shrink_kernel", "skinny_kernel", "dx_kernel", "two_pass_kernel"), "none")
    return none | {"skinny_kernel": "wide"} | ({"dx_kernel": "wide", "two_pass_kernel": "wide"} if rows >= 64 else {})


def _case(name, rows, rank, dtype, adapter=None, *, dropout_p=0.0, invariant=False, base=True, **sizes):
    """Forward and backward in one call."""
    slices = sizes.get("slices")
    x, weight, bias, lora_a, lora_b, scaling = arguments(rows, rank, dtype, adapter, **sizes)
    dy, seed = _empty(rows, weight.shape[0], dtype=dtype), _empty(dtype=torch.int64)

    def call():
        if base:
            _, h, mask = triton_train.lora_linear_train(
                x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, slices, invariant
            )
        else:
            h, mask = triton_train.lora_add_train_(dy, x, lora_a, lora_b, scaling, dropout_p, seed, invariant)
        triton_train.lora_linear_backward(
            dy, x, weight if base else None, lora_a, lora_b, scaling, h, mask, dropout_p, slices, True, True, True,
            invariant,
        )  # fmt: skip

    mma = _mma(rows, dtype)
    if dropout_p or adapter not in (None, dtype):  # masked blocks and three tf32 products: mma.sync will do
        mma["skinny_kernel"] = "none" if dtype == torch.float32 else "mma"
    return StaticCase(f"training {name} M{rows} r{rank}", call, mma)


def _several(name, rows, ranks, dtype, adapter=None, slices=None, by_columns=False):
    """``multi_lora_backward`` of adapters of these ranks."""
    x, weight, _, *_ = arguments(rows, 16, dtype, adapter, slices=slices, by_columns=by_columns)
    each = [arguments(rows, rank, dtype, adapter, slices=slices)[3:5] for rank in ranks]
    lora_a, lora_b = ([pair[i] for pair in each] for i in range(2))
    call = functools.partial(
        multi.multi_lora_backward, _empty(rows, weight.shape[0], dtype=dtype), x, weight, lora_a, lora_b,
        _empty(len(ranks)), _empty(rows, dtype=torch.int32), _empty(len(ranks) + 2, dtype=torch.int32), slices,
        [torch.empty_like(a) for a in lora_a], [torch.empty_like(b) for b in lora_b], True,
    )  # fmt: skip
    mma = _mma(rows, dtype)
    if adapter not in (None, dtype):
        mma["skinny_kernel"] = "mma"
    return StaticCase(f"multi_lora_backward {name} M{rows} ranks {ranks}", call, mma)


def cases():
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    return [
        *(_case("bf16", rows, rank, bf16) for rows, rank in _SIZES),
        *(_case("bf16, dropout,", 8192, rank, bf16, dropout_p=0.1) for rank in (16, 64)),
        _case("bf16, adapters f32,", 8192, 16, bf16, f32),
        _case("f16, adapters f32, dropout,", 8192, 64, f16, f32, dropout_p=0.1),
        _case("f32, dropout,", 8192, 16, f32, dropout_p=0.1),
        _case("bf16, 3 slices,", 8192, 16, bf16, slices=_SLICES),
        _case("bf16, weight by columns,", 8192, 64, bf16, by_columns=True),
        _case("bf16, odd sizes, dropout,", 8192, 13, bf16, dropout_p=0.1, features=4099, outputs=4001),
        _case("bf16, sizes of 1000,", 8192, 16, bf16, features=1000, outputs=1000),
        _case("bf16, adapters f32, dropout,", 8192, 8, bf16, f32, dropout_p=0.1),
        _case("bf16, update alone,", 8192, 8, bf16, base=False),
        _case("bf16, update alone, dropout,", 8192, 16, bf16, base=False, dropout_p=0.1),
        _several("bf16", 8192, (8, 64), bf16),
        _several("bf16, weight by columns,", 8192, (16, 16), bf16, by_columns=True),
        _several("bf16, adapters f32,", 8192, (16, 16), bf16, f32),
        _several("f32", 8192, (16, 16), f32),
    ]
