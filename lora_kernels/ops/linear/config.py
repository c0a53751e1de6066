"""Which Triton kernel and which tiles run ``lora_linear``: a pure function of sizes, dtype and GPU.

Four paths. ``decode`` (few rows): the weight streams once, tokens are the narrow operand, K may be split.
``one_pass`` (small rank): x Wᵀ and x Aᵀ in one K loop. ``two_pass``: h first, then a GEMM whose last K steps are the
update. ``vendor``, torch's GEMM and the update added in place, is taken only where ``python -m lora_kernels tune``
measured it to be faster (``ops/tuning.py``).
"""

import dataclasses

DECODE_RANK = 64  # the largest that the path ``decode`` takes


@dataclasses.dataclass(frozen=True)
class Config:
    """Path and tiles. ``split_k`` is used by ``decode``; ``tma`` by ``two_pass``; ``group_m`` by both GEMMs."""

    path: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    tma: bool = False
    group_m: int = 8


VENDOR = Config("vendor", 0, 0, 0, 0, 0)


def block_rank(rank, least=16):
    """Columns of h that one block holds: a power of two, as a tensor core needs it."""
    return min(64, max(least, 1 << (rank - 1).bit_length()))


def choose(
    num_tokens,
    in_features,
    out_features,
    rank,
    itemsize,
    capability,
    *,
    num_sms=132,
    batch_invariant=False,
    aligned=True,
    by_rows=True,
    mixed=False,
):
    """The :class:`Config` for a call. Pure.

    Args:
        num_tokens, in_features, out_features, rank: M, K, N, R.
        itemsize: bytes of an element of x.
        capability: (major, minor) of the GPU; (0, 0) for the interpreter, which gets small tiles.
        num_sms: multiprocessors, for splitting K.
        batch_invariant: nothing may depend on num_tokens.
        aligned: whether x and weight can be read 16 bytes at a time; else every element needs its own address.
        by_rows: whether TMA can address x and weight; read through pointers, the widest tile spills under Triton 3.6.
        mixed: float32 adapters on a half-precision base: products of the low-rank part take more registers.
    """
    if capability == (0, 0):
        return _interpreter(num_tokens, rank, batch_invariant)
    if itemsize == 4:
        return Config("two_pass", 64, 64, 32, 4, 2)
    large_memory = capability in ((8, 0), (9, 0), (10, 0), (10, 3))  # 160 KiB or more of shared memory a block
    if batch_invariant:
        return Config("two_pass", 64, 128, 32, 8, 2)
    if num_tokens <= 64:
        step = 32 if not aligned or (mixed and capability < (9, 0)) else 128 if large_memory and not mixed else 64
        return _few_rows(num_tokens, in_features, out_features, rank, num_sms, step, 3 if aligned else 2)
    if not aligned:
        return Config("two_pass", 128, 128, 32, 8, 2)
    wgmma = capability >= (9, 0) and large_memory
    if num_tokens <= 512 and rank <= 16 and not mixed:
        block_m, num_warps = (64, 4) if num_tokens <= 256 else (128, 8)
        return Config("one_pass", block_m, 128, 64 if wgmma else 32, num_warps, 3)
    if mixed and not wgmma:
        return Config("two_pass", 64, 64, 32, 4, 2)
    if not wgmma:
        return Config("two_pass", 128, 128, 32, 8, 3 if large_memory else 2)
    if num_tokens <= 512 or mixed or not by_rows or out_features % 16:
        # Where rows of y begin at no multiple of 16 elements, stores of 256 columns spill, on sm_100 of 128, as do
        # reads of 128 through pointers under Triton 3.6.
        block_n = 64 if capability >= (10, 0) and (out_features % 16 or not by_rows) else 128
        return Config("two_pass", 128, block_n, 64, 8, 3, tma=True)
    return Config("two_pass", 128, 256, 64, 8, 3, tma=True)


def _few_rows(num_tokens, in_features, out_features, rank, num_sms, block_k, num_stages):
    block_m = 16 if num_tokens <= 16 else 32 if num_tokens <= 32 else 64
    if rank > DECODE_RANK:
        return Config("two_pass", block_m, 64, min(block_k, 64), 4, num_stages)
    tiles = -(-out_features // 64)
    # A slice of K shorter than 12 steps of 128 costs more than it gains.
    split = max(1, min(num_sms // tiles if tiles else 1, in_features // 1536, 8))
    return Config("decode", block_m, 64, block_k, 4, num_stages, split_k=split)


def _interpreter(num_tokens, rank, batch_invariant):
    """Small tiles, so that small tensors have several and tails; every path is reached."""
    if batch_invariant:
        return Config("two_pass", 16, 32, 32, 4, 1)
    if num_tokens <= 16 and rank <= DECODE_RANK:
        return Config("decode", 16, 32, 32, 4, 1, split_k=3)
    if rank <= 16:
        return Config("one_pass", 16, 32, 32, 4, 1, group_m=2)
    return Config("two_pass", 32, 32, 32, 4, 1, tma=True, group_m=2)


def takes(tiles, num_tokens, rank):
    """Whether the path of a configuration can hold so many rows and ranks: what a file says is not trusted."""
    rows = tiles.block_m if tiles.path == "decode" else num_tokens
    return num_tokens <= rows and (rank <= DECODE_RANK or tiles.path not in ("decode", "one_pass"))
