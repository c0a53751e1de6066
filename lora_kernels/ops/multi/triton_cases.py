"""Calls of production size that reach every route and switch of ``triton.py``, for the static gate."""

import functools

import torch

from ..triton_host import StaticCase
from . import triton

# Rows, slots, max_rank of each route and tile size.
_SIZES = (
    (1, 8, 16),
    (16, 64, 64),
    (64, 64, 16),
    (200, 4, 16),
    (400, 64, 16),
    (800, 8, 64),
    (8192, 8, 16),
    (8192, 8, 96),
)
_SLICES = [4096, 1024, 1024]


def _empty(*shape, like):
    return torch.empty(shape, dtype=like, device="meta")


def _plan(rows, slots, slices):
    ranks = _empty(slots, *([len(slices)] if slices else []), like=torch.int32)
    return _empty(slots, like=torch.float32), ranks, _empty(rows, like=torch.int32), _empty(slots + 2, like=torch.int32)


def _mma(rows, dtype):
    names = ("decode", "finish", "fused", "shrink", "expand")
    if dtype == torch.float32:
        return dict.fromkeys((f"multi_{name}_kernel" for name in names), "none")
    return {"multi_decode_kernel": "wide", "multi_fused_kernel": "wide", "sum_planes_kernel": "none"}


def _case(name, rows, slots, rank, dtype, adapter=None, *, slices=None, features=4096, outputs=4096, listed=False,
          invariant=False, by_columns=False):  # fmt: skip
    adapter, outputs = adapter or dtype, sum(slices) if slices else outputs
    a = _empty(slots, *([len(slices)] if slices else []), rank, features, like=adapter)
    b = _empty(slots, outputs, rank, like=adapter)
    scalings, ranks, *plan = _plan(rows, slots, slices)
    x, weight, bias = (_empty(*shape, like=dtype) for shape in ((rows, features), (outputs, features), (outputs,)))
    weight = _empty(features, outputs, like=dtype).t() if by_columns else weight
    title = f"{name} M{rows} L{slots} r{rank}"
    if listed:
        adapters = ([a[0]] * slots, [b[0]] * slots, scalings)
        call = functools.partial(triton.multi_lora_linear_list, x, weight, bias, *adapters, *plan, slices, invariant)
        return StaticCase(f"multi_lora_linear_list {title}", call, _mma(rows, dtype))
    call = functools.partial(triton.multi_lora_linear, x, weight, bias, a, b, scalings, ranks, *plan, slices, invariant)
    return StaticCase(f"multi_lora_linear {title}", call, _mma(rows, dtype))


def _halves(name, rows, slots, rank, dtype, adapter=None):
    adapter = adapter or dtype
    scalings, ranks, *plan = _plan(rows, slots, None)
    x, y = _empty(rows, 4096, like=dtype), _empty(rows, 4096, like=dtype)
    h, a, b = (
        _empty(rows, rank, like=torch.float32),
        _empty(slots, rank, 4096, like=adapter),
        _empty(slots, 4096, rank, like=adapter),
    )
    expand = functools.partial(triton.lora_expand_, y, h, b, scalings, ranks, *plan, None, False)
    shrink = functools.partial(triton.lora_shrink, x, a, ranks, *plan, False)
    title = f"{name} M{rows} L{slots} r{rank}"
    return [
        StaticCase(f"lora_shrink {title}", shrink, _mma(rows, dtype)),
        StaticCase(f"lora_expand_ {title}", expand, _mma(rows, dtype)),
    ]


def cases():
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    found = [_case("bf16", *sizes, bf16) for sizes in _SIZES]
    for sizes in ((16, 64, 16), (400, 4, 16), (8192, 8, 16)):
        rows, slots, rank = sizes
        found.append(_case("bf16, adapters f32,", *sizes, bf16, f32))
        found.append(_case("f16, adapters f32,", rows, slots, 4 * rank, f16, f32))
        found.append(_case("bf16, odd sizes,", rows, slots, rank - 3, bf16, features=4099, outputs=4001))
        found.append(_case("bf16, 3 slices,", *sizes, bf16, slices=_SLICES))
        found.append(_case("f32", *sizes, f32))
    found.append(_case("bf16", 200, 4, 8, bf16))
    found.append(_case("bf16, weight by columns, 3 slices,", 800, 8, 16, bf16, slices=_SLICES, by_columns=True))
    for sizes in ((64, 8, 16), (800, 8, 16)):
        found.append(_case("bf16, sizes of 1000,", *sizes, bf16, features=1000, outputs=1000))
        found.append(_case("bf16, odd vocabulary,", *sizes, bf16, outputs=50257))
    for slots in (1, 8, 64):
        found.append(_case("bf16", 1024, slots, 16, bf16, listed=True))
        found.append(_case("bf16, adapters f32,", 8192, slots, 16, bf16, f32, listed=True))
    found.append(_case("bf16", 16, 4, 16, bf16, listed=True))
    found.append(_case("bf16, batch_invariant,", 8192, 64, 16, bf16, invariant=True))
    found.append(_case("bf16, odd sizes, batch_invariant,", 40, 64, 16, bf16, invariant=True, features=4099))
    for rows in (16, 8192):
        found += _halves("bf16", rows, 64, 16, bf16) + _halves("bf16, adapters f32,", rows, 64, 16, bf16, f32)
    return found
