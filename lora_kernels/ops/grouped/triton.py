"""Projections that share their input, on Triton: one shrink for all of them, then one launch of all their GEMMs with
their updates; backward, the gradient of x from all of them in one GEMM. Few rows, inference: one launch for all.

The tensors of a group are handed to the kernels as tuples of pointers: nothing is stacked in memory. Of two launches
the second is linked to the first (programmatic dependent launch) where the GPU has it.
"""

import functools

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import triton_host as host
from .. import tuning
from ..linear import triton as linear
from ..linear.triton_gradients import input_gradient, low_rank_of, skinny, sum_planes
from . import config, triton_kernels


def grouped_lora_linear(x, weights, biases, lora_a, lora_b, scalings, y, need_h, batch_invariant):
    with torch.no_grad():
        biases = biases or [None] * len(weights)
        ranks = [a.shape[0] for a in lora_a]
        h = torch.empty((x.shape[0], sum(ranks)), dtype=torch.float32, device=x.device) if need_h else None
        if x.shape[0] == 0:
            return x.new_empty(0, dtype=torch.float32) if h is None else h
        tiles = config_of(x, weights, lora_a, lora_b, need_h, batch_invariant)
        if tiles.path == "apart":
            for out, *each in zip(y, weights, biases, lora_a, lora_b, scalings, strict=True):
                linear.lora_linear_out(out, x, *each, None, False)
            return x.new_empty(0, dtype=torch.float32)
        if tiles.path == "decode":
            _decode(y, x, weights, biases, lora_a, lora_b, scalings, tiles)
            return x.new_empty(0, dtype=torch.float32)
        a = tuple(map(host.packed, lora_a))
        u = linear.shrink(
            x, a, tuple(scalings), lora_b[0].dtype, batch_invariant=batch_invariant, pdl=host.has_pdl(x), saved_h=h
        )
        _add_updates(y, x, weights, biases, u, lora_b, a, tiles)
        return x.new_empty(0, dtype=torch.float32) if h is None else h


def config_of(x, weights, lora_a, lora_b, need_h, batch_invariant):
    """The configuration of a call: measured on this GPU where it was, else by rule."""
    widths, rank = [weight.shape[0] for weight in weights], max(a.shape[0] for a in lora_a)
    mixed = x.dtype not in (lora_a[0].dtype, torch.float32) or x.dtype != lora_b[0].dtype
    aligned, by_rows = all(map(host.aligned, (x, *weights))), host.tma_ready(x, *weights)
    if by_rows and len(widths) <= config.MOST_WEIGHTS and not (mixed or batch_invariant):
        names = {"M": x.shape[0], "K": x.shape[1], "N": sum(widths), "R": rank, "T": len(widths), "H": int(need_h)}
        measured = tuning.measured("grouped_lora_linear", host.gpu_name(x), **names, B=x.element_size())
        if measured is not None and config.takes(measured, x.shape[0], rank, need_h):
            return measured
    rules = {"keep_h": need_h, "batch_invariant": batch_invariant, "num_sms": host.num_sms(x)}
    rules |= {"aligned": aligned, "by_rows": by_rows, "mixed": mixed}
    return config.choose(*x.shape, widths, rank, x.element_size(), host.capability(x), **rules)


def _decode(ys, x, weights, biases, lora_a, lora_b, scalings, tiles):
    """All in one launch: each tile makes the h of its projection from the x that it reads; none is stored."""
    widths, ranks = tuple(b.shape[0] for b in lora_b), tuple(a.shape[0] for a in lora_a)
    programs = sum(-(-width // tiles.block_n) for width in widths)
    if programs == 0:
        return
    groups = ([tuple(t.stride(d) for t in group) for d in (0, 1)] for group in (ys, weights, lora_a, lora_b))
    y_strides, w_strides, a_strides, b_strides = groups
    switches = linear.switches_of(x, biases[0], lora_a[0], lora_b[0], None, tiles)
    del switches["WIDTHS"], switches["NUM_SLICES"]
    triton_kernels.grouped_decode_kernel[(programs,)](
        tuple(ys), x, tuple(weights), tuple(biases), tuple(lora_a), tuple(lora_b), tuple(scalings), *x.shape, widths,
        ranks, *y_strides, *x.stride(), *w_strides, tuple(host.strides(bias)[0] for bias in biases), *a_strides,
        *b_strides, NUM_LISTED=len(widths), BLOCK_R=linear.decode_rank_block(max(ranks)), **switches,
    )  # fmt: skip


def _add_updates(ys, x, weights, biases, u, lora_b, lora_a, tiles):
    """ys[i] = x Wᵢᵀ + biasᵢ + uᵢ Bᵢᵀ in one launch."""
    ranks, widths = (tuple(factor.shape[dim] for factor in lora_b) for dim in (1, 0))
    padded, sizes = u.shape[1] // len(ranks), (tiles.block_m, tiles.block_n)
    num_tiles = -(-x.shape[0] // sizes[0]) * sum(-(-width // sizes[1]) for width in widths)
    if num_tiles == 0:
        return
    switches = linear.switches_of(x, biases[0], lora_a[0], lora_b[0], None, tiles)
    del switches["WIDTHS"], switches["NUM_SLICES"]
    block_r = linear.update_block(padded, switches)
    tma = tiles.tma and len(weights) <= host.MOST_DESCRIPTORS and host.tma_ready(x, u, *weights)
    described = host.descriptors(weights if tma else (), [sizes[1], tiles.block_k])
    if tma:
        x_operand = TensorDescriptor.from_tensor(x, [sizes[0], tiles.block_k])
        u_operand = TensorDescriptor.from_tensor(u, [sizes[0], block_r])
        operands = (x_operand, (None,), *described, u_operand)
    else:
        operands = (x, tuple(weights), *described, u)
    pdl, programs = host.has_pdl(x), host.num_sms(x)
    y_strides, w_strides, b_strides = ([tuple(t.stride(d) for t in g) for d in (0, 1)] for g in (ys, weights, lora_b))
    bias_strides = tuple(host.strides(bias)[0] for bias in biases)
    triton_kernels.grouped_kernel[(min(num_tiles, programs),)](
        tuple(ys), *operands, tuple(biases), tuple(lora_b), *x.shape, widths, ranks, padded,
        *y_strides, *x.stride(), *w_strides, u.stride(0), bias_strides, *b_strides,
        NUM_LISTED=len(ranks), TMA=tma, PDL=pdl, BLOCK_R=block_r, GROUP_M=tiles.group_m, NUM_PROGRAMS=programs,
        **switches, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def grouped_lora_backward(x, dy, weights, lora_a, lora_b, scalings, h, da, db, need_x, batch_invariant):
    with torch.no_grad():
        dx = x.new_empty(x.shape if need_x else (0,))
        num_rows, ranks = x.shape[0], [a.shape[0] for a in lora_a]
        columns = [slice(sum(ranks[:i]), sum(ranks[: i + 1])) for i in range(len(ranks))]
        g = torch.empty((num_rows, sum(ranks)), dtype=lora_a[0].dtype, device=x.device)
        for i, (grad, b) in enumerate(zip(dy, lora_b, strict=True)):
            right = h[:, columns[i]] if db else None
            wanted = {"right": right, "need_low": need_x or bool(da), "batch_invariant": batch_invariant}
            grads, lows = skinny(grad, b.unsqueeze(0), scalings[i], **wanted)
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


def _case(name, rows, ranks, dtype, adapter=None, *, features=4096, outputs=(4096, 1024, 1024), train=True,
          archs=(80, 90, 100)):  # fmt: skip
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
        none |= dict.fromkeys(("shrink_kernel", "skinny_kernel", "dx_kernel", "grouped_kernel"), "none")
    else:
        none |= dict.fromkeys(("dx_kernel", "grouped_kernel", "grouped_decode_kernel"), "wide")
    return host.StaticCase(f"grouped {name} M{rows} ranks {tuple(ranks)}", call, none, archs)


_ODD = (4001, 1021, 1023)


def STATIC_CASES():
    """Production sizes, for the static gate: Q, K, V and gate, up of an 8B model."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    gate_up = functools.partial(_case, outputs=(14336, 14336))
    few = ((1, (16, 16, 16)), (16, (16, 16, 16)), (32, (16, 8, 32)), (64, (64, 64, 64)))
    return [
        *(_case("bf16, inference,", rows, ranks, bf16, train=False) for rows, ranks in few),
        gate_up("bf16, inference, gate and up,", 16, (16, 16), bf16, train=False),
        _case("bf16, adapters f32, inference,", 16, (16, 16, 16), bf16, f32, train=False),
        _case("f16, adapters f32, inference,", 64, (64, 64, 64), f16, f32, train=False),
        _case("bf16, odd sizes, inference,", 32, (13, 5, 60), bf16, features=4099, train=False, outputs=_ODD),
        _case("bf16, inference,", 400, (16, 16, 16), bf16, train=False),
        _case("bf16, inference,", 8192, (16, 16, 16), bf16, train=False),
        _case("bf16", 400, (16, 8, 32), bf16),
        _case("bf16", 8192, (16, 16, 16), bf16),
        gate_up("bf16, gate and up,", 8192, (64, 64), bf16),
        gate_up("bf16, adapters f32, gate and up,", 8192, (16, 16), bf16, f32),
        _case("f16, adapters f32,", 8192, (16, 16, 16), f16, f32),
        _case("bf16, odd sizes,", 8192, (13, 5, 13), bf16, features=4099, outputs=_ODD),
        _case("bf16, sizes of 1000, inference,", 64, (16, 16), bf16, features=1000, outputs=(1000, 1000), train=False),
        # On sm_100 a few bytes spill.
        _case("bf16, a width of 1000,", 8192, (8, 8), bf16, outputs=(4096, 1000), archs=(80, 90)),
        _case("f32", 8192, (16, 16, 16), f32),
    ]
