"""Calls of production size that reach every path and switch of ``triton.py``, for the static gate."""

import functools

import torch

from ..triton_host import StaticCase
from . import triton

# Rows and rank of each path and tile size.
_SIZES = ((1, 16), (32, 16), (64, 64), (16, 128), (64, 256), (200, 16), (400, 8), (400, 32), (8192, 16), (8192, 64))
# Sizes that are multiples of 8, not of 16: TMA takes them, and rows are no multiple of what Triton knows of a stride.
_EIGHTS = {"features": 1000, "outputs": 1000}
_BY_COLUMNS = ((1, 16), (200, 16), (8192, 16), (8192, 64))  # as the layers of GPT-2 store it
_SLICES = [4096, 1024, 1024]


def arguments(rows, rank, dtype, adapter=None, *, features=4096, outputs=4096, slices=None, by_columns=False):
    def empty(*shape, like=dtype):
        return torch.empty(shape, dtype=like, device="meta")

    adapter = adapter or dtype
    outputs = sum(slices) if slices else outputs
    lora_a = empty(len(slices), rank, features, like=adapter) if slices else empty(rank, features, like=adapter)
    adapters = (lora_a, empty(outputs, rank, like=adapter), empty(like=torch.float32))
    weight = empty(features, outputs).t() if by_columns else empty(outputs, features)
    return (empty(rows, features), weight, empty(outputs), *adapters)


def _mma(rows, dtype):
    """Tiles of 64 rows and more go to the wide instruction; decode turns the weight's rows that way."""
    if dtype == torch.float32:
        return dict.fromkeys(("shrink_kernel", "two_pass_kernel", "decode_kernel", "sum_splits_kernel"), "none")
    wide = {"one_pass_kernel": "wide", "decode_kernel": "wide", "sum_splits_kernel": "none"}
    return wide | ({"two_pass_kernel": "wide"} if rows >= 64 else {})


def _forward(name, rows, rank, dtype, adapter=None, *, invariant=False, **sizes):
    slices = sizes.get("slices")
    call_with = (*arguments(rows, rank, dtype, adapter, **sizes), slices, invariant)
    call = functools.partial(triton.lora_linear, *call_with)
    return StaticCase(f"lora_linear {name} M{rows} r{rank}", call, _mma(rows, dtype))


def _add(name, rows, rank, dtype, adapter=None):
    x, weight, _, *adapters = arguments(rows, rank, dtype, adapter)
    y = torch.empty((rows, weight.shape[0]), dtype=dtype, device="meta")
    call = functools.partial(triton.lora_add_, y, x, *adapters, False)
    return StaticCase(f"lora_add_ {name} M{rows} r{rank}", call, _mma(rows, dtype))


def cases():
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    found = [_forward("bf16", rows, rank, bf16) for rows, rank in _SIZES]
    for rows, rank in ((1, 16), (400, 16), (8192, 16)):
        found.append(_forward("bf16, adapters f32,", rows, rank, bf16, f32))
        found.append(_forward("f16, adapters f32,", rows, 4 * rank, f16, f32))
        found.append(_forward("bf16, odd sizes,", rows, rank - 3, bf16, features=4099, outputs=4001))
        found.append(_forward("bf16, 3 slices,", rows, rank, bf16, slices=_SLICES))
    found += [_forward("bf16, weight by columns,", rows, rank, bf16, by_columns=True) for rows, rank in _BY_COLUMNS]
    found += [_forward("bf16, sizes of 1000,", rows, 16, bf16, **_EIGHTS) for rows in (64, 200, 8192)]
    found += [_forward("bf16, odd vocabulary,", rows, 8, bf16, outputs=50257) for rows in (16, 400, 8192)]
    found.append(_forward("bf16", 8192, 8, bf16))
    found.append(_forward("f16", 8192, 16, f16))
    found.append(_forward("f32", 8192, 16, f32))
    found.append(_forward("bf16, batch_invariant,", 8192, 16, bf16, invariant=True))
    found.append(_forward("bf16, odd sizes, batch_invariant,", 40, 16, bf16, invariant=True, features=4099))
    found.append(_forward("f16, adapters f32,", 64, 64, f16, f32))
    found.append(_forward("bf16, odd sizes,", 64, 60, bf16, features=4099))
    found += [_add("bf16", rows, rank, bf16) for rows, rank in ((1, 16), (8192, 16), (8192, 64))]
    found.append(_add("bf16, adapters f32,", 8192, 16, bf16, f32))
    found.append(_add("f16, adapters f32,", 8192, 8, f16, f32))
    return found
