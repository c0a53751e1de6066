"""Projections that share their input, on Triton: one shrink for all of them, then a GEMM with its update for each;
backward, the gradient of x from all of them in one GEMM.

The factors are handed to the shrink as tuples of pointers: nothing is stacked in memory. The launches follow one
another, each linked to the one before (programmatic dependent launch), so that all wait for the shrink.
"""

import functools

import torch

from .. import triton_host as host
from ..linear import triton as linear
from ..linear.triton_gradients import input_gradient, low_rank_of, skinny, sum_planes
from ..linear.triton_train import two_pass_config

_FEW_ROWS = 64  # up to here the weights' bytes are what counts, and the kernels of one projection stream them best


def grouped_lora_linear(x, weights, biases, lora_a, lora_b, scalings, y, need_h, batch_invariant):
    with torch.no_grad():
        biases = biases or [None] * len(weights)
        ranks = [a.shape[0] for a in lora_a]
        h = torch.empty((x.shape[0], sum(ranks)), dtype=torch.float32, device=x.device) if need_h else None
        if x.shape[0] == 0:
            return x.new_empty(0, dtype=torch.float32) if h is None else h
        if x.shape[0] <= _FEW_ROWS and not (need_h or batch_invariant):
            for out, *each in zip(y, weights, biases, lora_a, lora_b, scalings, strict=True):
                linear.lora_linear_out(out, x, *each, None, False)
            return x.new_empty(0, dtype=torch.float32)
        a = tuple(factor.contiguous() for factor in lora_a)
        u = linear.shrink(
            x, a, tuple(scalings), lora_b[0].dtype, batch_invariant=batch_invariant, pdl=host.has_pdl(x), saved_h=h
        )
        padded = u.shape[1] // len(ranks)
        for i, (out, weight, bias, b) in enumerate(zip(y, weights, biases, lora_b, strict=True)):
            if out.numel():
                tiles = two_pass_config(x, weight, a[i], b, batch_invariant)
                switches = linear.switches_of(x, bias, a[i], b, None, tiles)
                columns = u[:, i * padded : (i + 1) * padded]
                linear.add_update(out, x, weight, bias, columns, b, ranks[i], None, tiles, switches)
        return x.new_empty(0, dtype=torch.float32) if h is None else h


def grouped_lora_backward(x, dy, weights, lora_a, lora_b, scalings, h, da, db, need_x, batch_invariant):
    with torch.no_grad():
        dx = x.new_empty(x.shape if need_x else (0,))
        num_rows, ranks = x.shape[0], [a.shape[0] for a in lora_a]
        columns = [slice(sum(ranks[:i]), sum(ranks[: i + 1])) for i in range(len(ranks))]
        g = torch.empty((num_rows, sum(ranks)), dtype=lora_a[0].dtype, device=x.device)
        for i, (grad, b) in enumerate(zip(dy, lora_b, strict=True)):
            right = h[:, columns[i]] if db else None
            grads, lows = skinny(grad, b.unsqueeze(0), scalings[i], right=right, need_low=need_x or bool(da))
            if db:
                sum_planes(db[i], grads[:, 0])
            if lows is not None:
                low_rank_of(lows, num_rows, ranks[i], g.dtype, out=g[:, columns[i]])
        if da:
            # Of the factor only the dtype and the rank count here.
            like = lora_a[0].new_empty((1, 1, 1)).expand(1, x.shape[1], g.shape[1])
            grads, _ = skinny(x, like, None, right=g, need_low=False, by_rank=True)
            for target, part in zip(da, columns, strict=True):
                sum_planes(target, grads[:, 0, part])
        if need_x:
            stacked = torch.cat(lora_a).unsqueeze(0)
            input_gradient(dx, tuple(dy), tuple(weights), g, stacked, batch_invariant=batch_invariant)
        return dx


KERNELS = {"grouped_lora_linear": grouped_lora_linear, "grouped_lora_backward": grouped_lora_backward}


def _case(name, rows, ranks, dtype, adapter=None, *, features=4096, outputs=(4096, 1024, 1024), train=True):
    """Forward, and backward with ``train``."""
    adapter = adapter or dtype

    def empty(*shape, like=dtype):
        return torch.empty(shape, dtype=like, device="meta")

    x, dy = empty(rows, features), [empty(rows, width) for width in outputs]
    weights, biases = [empty(width, features) for width in outputs], [empty(width) for width in outputs]
    lora_a = [empty(rank, features, like=adapter) for rank in ranks]
    lora_b = [empty(width, rank, like=adapter) for width, rank in zip(outputs, ranks, strict=True)]
    scalings = [empty(like=torch.float32) for _ in ranks]

    def call():
        h = grouped_lora_linear(x, weights, biases, lora_a, lora_b, scalings, dy, train, False)
        if train:
            da, db = ([torch.empty_like(factor) for factor in factors] for factors in (lora_a, lora_b))
            grouped_lora_backward(x, dy, weights, lora_a, lora_b, scalings, h, da, db, True, False)

    none = dict.fromkeys(("sum_planes_kernel", "sum_splits_kernel"), "none")
    if dtype == torch.float32:
        none |= dict.fromkeys(("shrink_kernel", "skinny_kernel", "dx_kernel", "two_pass_kernel"), "none")
    else:
        none |= {"dx_kernel": "wide", "two_pass_kernel": "wide"}
    return host.StaticCase(f"grouped {name} M{rows} ranks {tuple(ranks)}", call, none)


def STATIC_CASES():
    """Production sizes, for the static gate: Q, K, V and gate, up of an 8B model."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    gate_up = functools.partial(_case, outputs=(14336, 14336))
    return [
        _case("bf16, inference,", 16, (16, 16, 16), bf16, train=False),
        _case("bf16, inference,", 400, (16, 16, 16), bf16, train=False),
        _case("bf16, inference,", 8192, (16, 16, 16), bf16, train=False),
        _case("bf16", 400, (16, 8, 32), bf16),
        _case("bf16", 8192, (16, 16, 16), bf16),
        gate_up("bf16, gate and up,", 8192, (64, 64), bf16),
        gate_up("bf16, adapters f32, gate and up,", 8192, (16, 16), bf16, f32),
        _case("f16, adapters f32,", 8192, (16, 16, 16), f16, f32),
        _case("bf16, odd sizes,", 8192, (13, 5, 13), bf16, features=4099, outputs=(4001, 1021, 1023)),
        _case("f32", 8192, (16, 16, 16), f32),
    ]
