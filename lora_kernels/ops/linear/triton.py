"""``lora_linear``, ``lora_linear_out`` and ``lora_add_`` on Triton: which kernels, which grids. See triton_kernels.py.

Nothing here waits for the GPU, and every size comes from the host: the calls can be captured in a CUDA graph.
"""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import triton_host as host
from .. import tuning
from . import config, triton_kernels


def _padded(rank):
    """(columns of a block of h, columns of h a slice): the fewest columns, then the fewest blocks."""
    widths = (16, 32, 64)
    block = min(widths, key=lambda width: (-(-rank // width) * width, -width))
    return block, -(-rank // block) * block


def config_of(x, weight, lora_a, lora_b, batch_invariant):
    """The configuration of a call: measured on this GPU where it was, else by rule."""
    sizes = (*x.shape, weight.shape[0], lora_a.shape[-2], x.element_size())
    names = dict(zip("MKNRB", sizes, strict=True))
    mixed = x.dtype not in (lora_a.dtype, torch.float32) or x.dtype != lora_b.dtype
    aligned, by_rows = host.aligned(x) and host.aligned(weight), host.tma_ready(x, weight)
    if by_rows and not (mixed or batch_invariant):
        measured = tuning.measured("lora_linear", host.gpu_name(x), **names)
        if measured is not None and config.takes(measured, x.shape[0], lora_a.shape[-2]):
            return measured
    rules = {"batch_invariant": batch_invariant, "aligned": aligned, "by_rows": by_rows, "mixed": mixed}
    return config.choose(*sizes, host.capability(x), num_sms=host.num_sms(x), **rules)


def shrink(x, lora_a, scaling, dtype, *, batch_invariant=False, pdl=False, saved_h=None, mask=None, multiplier=None):
    """U = s · h (M, S · padded rank) in ``dtype``, zero in the padding; h = x Aᵀ, lora_a (S, R, K).

    Projections that share x: ``lora_a`` a tuple of packed (Rᵢ, K), ``scaling`` a tuple; each has the padded rank of
    the largest. Training: ``saved_h`` (M, S · R) float32 receives h; ``mask`` and ``multiplier`` apply dropout to x.
    """
    one = lora_a[0]
    if isinstance(lora_a, tuple):
        listed, ranks = len(lora_a), tuple(a.shape[0] for a in lora_a)
        num_slices, rank, strides = listed, max(ranks), (0, x.shape[1], 1)
    else:
        listed, ranks, (num_slices, rank), strides = 0, None, lora_a.shape[:2], lora_a.stride()
    block, padded = _padded(rank)
    u = torch.empty((x.shape[0], num_slices * padded), dtype=dtype, device=x.device)
    few = x.shape[0] <= 2048 or batch_invariant
    # A masked x is in registers: from there wgmma, which starts at 64 rows, is serialised; mma.sync is not.
    block_m = 16 if few else 64 if mask is None else 32
    # Many rows: one block of columns where it holds them all, so that x is read once.
    block_h = 16 if x.shape[0] <= 64 or batch_invariant else block if few else _block_columns(u.shape[1], block)
    precision = host.precision(x, one) if saved_h is None else host.full_precision(x, one)
    # Three tf32 products, or an address for each element, take too many registers for a long step.
    plain = host.aligned(x) and host.aligned(one) and precision == "tf32"
    block_k = (128 if block_h <= 32 else 64) if plain and not host.INTERPRETED else 32
    grid = (-(-x.shape[0] // block_m), -(-u.shape[1] // block_h))
    triton_kernels.shrink_kernel[grid](
        u, x, lora_a, ranks, scaling, x.shape[0], x.shape[1], u.shape[1], rank, padded,
        u.stride(0), *x.stride(), *strides, saved_h, 0 if saved_h is None else saved_h.stride(0), mask, multiplier,
        EVEN_K=x.shape[1] % block_k == 0, NUM_LISTED=listed, PRECISION=precision, UPCAST=host.upcast(x, one, u),
        PDL=pdl, BLOCK_M=block_m, BLOCK_H=block_h, BLOCK_K=block_k, num_warps=4, num_stages=3 if plain else 2,
    )  # fmt: skip
    return u


def _block_columns(columns, block):
    """The narrowest block that holds all columns, or ``block`` where none does."""
    return max(block, min((width for width in (16, 32, 64) if width >= columns), default=block))


def run(y, x, weight, bias, lora_a, lora_b, scaling, out_splits, tiles, batch_invariant=False, **training):
    """y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ with the given :class:`~.config.Config`; ``training``: as :func:`shrink`'s, for
    the path ``two_pass``."""
    if y.numel() == 0:
        return
    a = lora_a.unsqueeze(0) if lora_a.dim() == 2 else lora_a
    if tiles.path == "vendor":
        _vendor(y, x, weight, bias, a, lora_b, scaling, out_splits, batch_invariant)
        return
    launch = {"decode": _decode, "one_pass": _one_pass, "two_pass": _two_pass}[tiles.path]
    switches = switches_of(x, bias, lora_a, lora_b, out_splits, tiles)
    launch(y, x, weight, bias, a, lora_b, scaling, out_splits, tiles, batch_invariant, switches, **training)


def switches_of(x, bias, lora_a, lora_b, out_splits, tiles):
    """Constants and options that every kernel of a path takes."""
    return {
        "WIDTHS": tuple(out_splits or ()),
        "NUM_SLICES": len(out_splits or ()),
        "HAS_BIAS": bias is not None,
        "EVEN_K": x.shape[1] % tiles.block_k == 0,
        "PRECISION": host.precision(x),
        "LOW_PRECISION": host.precision(x, lora_a, lora_b),
        "UPCAST": host.upcast(x, lora_a, lora_b),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _one_pass(y, x, weight, bias, a, b, scaling, out_splits, tiles, batch_invariant, switches):
    tiles_n = host.tiles_n(weight, out_splits, tiles.block_n)
    triton_kernels.one_pass_kernel[(-(-x.shape[0] // tiles.block_m) * tiles_n,)](
        y, x, weight, bias, a, b, scaling, x.shape[0], weight.shape[0], x.shape[1], a.shape[1],
        *y.stride(), *x.stride(), *weight.stride(), *host.strides(bias), *a.stride(), *b.stride(), tiles_n,
        BLOCK_R=config.block_rank(a.shape[1]), GROUP_M=tiles.group_m, **switches,
    )  # fmt: skip


def update_block(padded, switches):
    """Columns of u that one step of an update takes, of a multiple of them."""
    return 16 if switches["LOW_PRECISION"] == "tf32x3" else _padded(padded)[0]


def _two_pass(y, x, weight, bias, a, b, scaling, out_splits, tiles, batch_invariant, switches, **training):
    pdl = host.has_pdl(x)
    u = shrink(x, a, scaling, b.dtype, batch_invariant=batch_invariant, pdl=pdl, **training)
    padded = u.shape[1] // len(out_splits or (0,))
    block_r = update_block(padded, switches)
    tiles_n = host.tiles_n(weight, out_splits, tiles.block_n)
    programs = host.num_sms(x)
    tma = tiles.tma and host.tma_ready(x, weight, u)
    blocks = ((x, tiles.block_m, tiles.block_k), (weight, tiles.block_n, tiles.block_k), (u, tiles.block_m, block_r))
    operands = [TensorDescriptor.from_tensor(t, [r, c]) if tma else t for t, r, c in blocks]
    triton_kernels.two_pass_kernel[(min(-(-x.shape[0] // tiles.block_m) * tiles_n, programs),)](
        y, *operands, bias, b, x.shape[0], weight.shape[0], x.shape[1], a.shape[1], padded,
        *y.stride(), *x.stride(), *weight.stride(), u.stride(0), *host.strides(bias), *b.stride(), tiles_n,
        TMA=tma, PDL=pdl, BLOCK_R=block_r, GROUP_M=tiles.group_m, NUM_PROGRAMS=programs,
        **switches, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def decode_rank_block(rank):
    """Rows of A are the wide operand of a tensor core: 64 of them, or the stream of products is serialised."""
    return config.block_rank(rank, 16 if host.INTERPRETED else 64)


def _decode(y, x, weight, bias, a, b, scaling, out_splits, tiles, batch_invariant, switches):
    split, pdl = tiles.split_k, tiles.split_k > 1 and host.has_pdl(x)
    num_rows, out_features = y.shape
    planes = torch.empty((split, *y.shape), dtype=torch.float32, device=y.device) if split > 1 else None
    tiles_n = host.tiles_n(weight, out_splits, tiles.block_n)
    triton_kernels.decode_kernel[(tiles_n, split)](
        y, planes, x, weight, bias, a, b, scaling, num_rows, out_features, x.shape[1], a.shape[1],
        *y.stride(), *x.stride(), *weight.stride(), *host.strides(bias), *a.stride(), *b.stride(),
        PDL=pdl, BLOCK_R=decode_rank_block(a.shape[1]), SPLIT=split, **switches,
    )  # fmt: skip
    if split > 1:
        block_m, block_n = min(16, tiles.block_m), 128
        triton_kernels.sum_splits_kernel[(-(-out_features // block_n), -(-num_rows // block_m))](
            y, planes, bias, num_rows, out_features, *y.stride(), *host.strides(bias),
            HAS_BIAS=bias is not None, PDL=pdl, UPCAST=switches["UPCAST"], SPLIT=split,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip


def _vendor(y, x, weight, bias, a, b, scaling, out_splits, batch_invariant):
    """torch's GEMM, then the update of each slice added in place."""
    with torch.no_grad():
        torch.mm(x, weight.t(), out=y) if bias is None else torch.addmm(bias, x, weight.t(), out=y)
        begin = 0
        for index, width in enumerate(out_splits or (y.shape[1],)):
            part = slice(begin, begin + width)
            lora_add_(y[:, part], x, a[index], b[part], scaling, batch_invariant)
            begin += width


def lora_linear_out(out, x, weight, bias, lora_a, lora_b, scaling, out_splits, batch_invariant):
    tiles = config_of(x, weight, lora_a, lora_b, batch_invariant)
    run(out, x, weight, bias, lora_a, lora_b, scaling, out_splits, tiles, batch_invariant)


def lora_linear(x, weight, bias, lora_a, lora_b, scaling, out_splits, batch_invariant):
    y = x.new_empty((x.shape[0], weight.shape[0]))
    lora_linear_out(y, x, weight, bias, lora_a, lora_b, scaling, out_splits, batch_invariant)
    return y


def lora_add_(y, x, lora_a, lora_b, scaling, batch_invariant, **training):
    if y.numel() == 0:
        return
    a, pdl = lora_a.unsqueeze(0), host.has_pdl(x)
    block_r, padded = _padded(lora_a.shape[0])
    u = shrink(x, a, scaling, lora_b.dtype, batch_invariant=batch_invariant, pdl=pdl, **training)
    low_precision = host.precision(x, lora_b)
    block_n = 64 if low_precision == "tf32x3" else 128  # three products of 128 columns spill
    block_m, block_n = (16, 32) if host.INTERPRETED else (64 if batch_invariant or y.shape[0] > 32 else 16, block_n)
    tiles_n = -(-y.shape[1] // block_n)
    triton_kernels.expand_kernel[(-(-y.shape[0] // block_m) * tiles_n,)](
        y, u, lora_b, *y.shape, lora_a.shape[0], padded, *y.stride(), u.stride(0), *lora_b.stride(), tiles_n,
        PDL=pdl, LOW_PRECISION=low_precision, UPCAST=host.upcast(x, lora_b, y),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=block_r, num_warps=4, num_stages=2,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


KERNELS = {"lora_linear": lora_linear, "lora_linear_out": lora_linear_out, "lora_add_": lora_add_}


def STATIC_CASES():
    """Production sizes of every path, for the static gate."""
    from . import triton_cases

    return triton_cases.cases()
