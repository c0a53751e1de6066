"""``merge_``, ``merge_is_finite`` and ``switch_`` on Triton: one launch, one pass over the weight."""

import dataclasses
import functools

import torch
import triton

from .. import triton_host as host
from .. import tuning
from . import config, triton_kernels


def _precision(lora_a, lora_b):
    return "ieee" if torch.float32 in (lora_a.dtype, lora_b.dtype) else "tf32"


def _block_rank(rank, precision):
    return min(16 if precision == "ieee" else 32, max(16, triton.next_power_of_2(rank)))


def _launch(weight, sign, finite, old, new=None):
    if weight.numel() == 0:
        return
    # The dimension with the smaller stride goes along a row of the tile.
    turned = weight.stride(0) < weight.stride(1)
    factors = []
    for lora_a, lora_b, scaling in (old, new or old):
        pair = (lora_a.t(), lora_b.t()) if turned else (lora_b, lora_a)
        factors.append((*pair, scaling, _precision(lora_a, lora_b)))
    (left, right, scaling, precision), (new_left, new_right, new_scaling, new_precision) = factors
    target = weight.t() if turned else weight
    strict = "ieee" if new and "ieee" in (precision, new_precision) else precision
    strided, tiles = target.stride(1) != 1, None
    if strict == "tf32" and not (strided or turned):
        rank = max(left.shape[1], new_left.shape[1])
        sizes = {"N": target.shape[0], "K": target.shape[1], "R": rank, "B": weight.element_size()}
        tiles = tuning.measured("switch_" if new else "merge_", host.gpu_name(weight), **sizes)
    tiles = tiles or config.choose(weight.element_size(), strict, strided, host.INTERPRETED)
    block_m, block_n, num_warps = dataclasses.astuple(tiles)
    tiles_n = -(-target.shape[1] // block_n)
    triton_kernels.merge_kernel[(-(-target.shape[0] // block_m) * tiles_n,)](
        target, finite, left, right, scaling, new_left, new_right, new_scaling,
        *target.shape, left.shape[1], new_left.shape[1], float(sign), *target.stride(), *left.stride(), *right.stride(),
        *new_left.stride(), *new_right.stride(), tiles_n,
        SWITCH=new is not None, CHECK=finite is not None, PRECISION=precision, NEW_PRECISION=new_precision,
        UPCAST=host.upcast(weight, left, right, new_left, new_right), BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_R=_block_rank(left.shape[1], precision), NEW_BLOCK_R=_block_rank(new_left.shape[1], new_precision),
        num_warps=num_warps, num_stages=2,
    )  # fmt: skip


def merge_(weight, lora_a, lora_b, scaling, sign):
    with torch.no_grad():
        _launch(weight, sign, None, (lora_a, lora_b, scaling))


def merge_is_finite(weight, lora_a, lora_b, scaling, sign):
    with torch.no_grad():
        finite = torch.ones((), dtype=torch.uint8, device=weight.device)
        _launch(weight, sign, finite, (lora_a, lora_b, scaling))
        return finite.bool()


def switch_(weight, old_a, old_b, old_scaling, new_a, new_b, new_scaling):
    with torch.no_grad():
        _launch(weight, -1.0, None, (old_a, old_b, old_scaling), (new_a, new_b, new_scaling))


KERNELS = {"merge_": merge_, "merge_is_finite": merge_is_finite, "switch_": switch_}


def _case(name, op, rank, dtype, adapter=None, *, turned=False, stride=1):
    adapter = adapter or dtype

    def empty(*shape, like):
        return torch.empty(shape, dtype=like, device="meta")

    weight = empty(4096, 4096 * stride, like=dtype)[:, ::stride]
    adapter = (empty(rank, 4096, like=adapter), empty(4096, rank, like=adapter), empty(like=torch.float32))
    rest = adapter if op is switch_ else (1.0,)
    call = functools.partial(op, weight.t() if turned else weight, *adapter, *rest)
    mma = "none" if torch.float32 in (adapter[0].dtype, dtype) else "mma"
    return host.StaticCase(f"{op.__name__} {name} r{rank}", call, {"merge_kernel": mma})


def STATIC_CASES():
    """Production sizes, for the static gate."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    found = [_case("bf16", op, rank, bf16) for op in (merge_, merge_is_finite, switch_) for rank in (16, 64, 256)]
    found += [_case("bf16, adapters f32,", op, 16, bf16, f32) for op in (merge_, merge_is_finite, switch_)]
    found += [_case("f32", op, 64, f32) for op in (merge_, switch_)]
    found += [_case("f16", merge_, 16, f16), _case("bf16, by columns,", switch_, 16, bf16, turned=True)]
    found.append(_case("bf16, strided,", switch_, 13, bf16, stride=2))
    return found
