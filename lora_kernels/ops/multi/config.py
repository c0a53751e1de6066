"""Which Triton kernels and which tiles run a multi-adapter op: a pure function of sizes, dtype and GPU.

Three routes. ``decode`` (few rows): splits of the base product and the shrink in one launch, then one that finishes.
``fused``: shrink, then a GEMM that adds each slot's update to its accumulator. ``vendor``: torch's GEMM, shrink, and
the update added in place; a GEMM of our own wins only where it reaches 92 % of the vendor's speed.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tiles:
    """``block_n`` is the number of columns of h for a shrink; ``split`` divides K, or is unused."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """Route, and the tiles of the base product, of the shrink and of the expand (or finish)."""

    route: str
    base: Tiles
    shrink: Tiles
    expand: Tiles


def choose(
    num_tokens,
    in_features,
    out_features,
    num_columns,
    num_slots,
    itemsize,
    capability,
    *,
    num_sms=132,
    batch_invariant=False,
    plain=True,
    aligned=True,
    by_rows=True,
):
    """The :class:`Config` of a call. Pure.

    Args:
        num_tokens, in_features, out_features: M, K, N.
        num_columns: slices · max_rank.
        num_slots: slots of the bank: a row may belong to any.
        itemsize: bytes of an element of x.
        capability: (major, minor) of the GPU; (0, 0) for the interpreter, which gets small tiles.
        num_sms: multiprocessors, for splitting K.
        batch_invariant: nothing may depend on num_tokens.
        plain: adapters in the dtype of x, to be read 16 bytes at a time.
        aligned: whether x and weight can be read 16 bytes at a time.
        by_rows: whether the weight is stored by rows.
    """
    if capability == (0, 0):
        return _interpreter(num_tokens, num_slots, batch_invariant)
    large_memory = capability in ((8, 0), (9, 0), (10, 0), (10, 3))  # 160 KiB or more of shared memory a block
    half = itemsize == 2
    # A slot has few rows where there are many slots: then a tile of 64 would be nearly empty.
    few = num_tokens < 64 * max(num_slots, 1)
    plain = plain and aligned
    if batch_invariant:
        base = Tiles(64, 128, 32, 8, 2) if half else Tiles(64, 64, 32, 8, 2)
        return Config("fused", base, _shrink(16, 16, plain and half), Tiles(16, 128, 0, 4, 2))
    expand = Tiles(16, 128 if half else 64, 0, 4, 2) if few else Tiles(64, 128 if half else 64, 0, 8, 2)
    if num_tokens <= 64:
        block_k = 32 if not (plain and half) else 128 if large_memory else 64
        return _few_rows(num_tokens, in_features, out_features, block_k, num_sms, expand, 4 if half else 8)
    # With float32 adapters a tile of 64 rows would become wgmma that ptxas serialises.
    shrink_rows = 16 if few else 64 if plain else 32
    shrink = _split(_shrink(shrink_rows, _columns(num_columns), plain and half), num_tokens, in_features, num_sms)
    base = Tiles(128, 128, 64 if half and large_memory and capability >= (9, 0) else 32, 8, 3 if aligned else 2)
    if not half:
        base = Tiles(64, 64, 32, 8, 2)
    elif not plain:  # three tf32 products, or an address for each element, take registers
        base = Tiles(64, 128, 32, 8, 2)
    elif num_tokens <= 256 or out_features % 16 or (capability >= (9, 0) and not by_rows):
        # Where rows of y begin at no multiple of 16 elements, stores of 128 rows spill; from sm_90 on a weight by
        # columns, too.
        base = dataclasses.replace(base, block_m=64)
    # The slots of one tile follow one another: with few rows each, adding in place is faster.
    route = "fused" if num_tokens <= 1024 and num_tokens >= 16 * num_slots else "vendor"
    return Config(route, base, shrink, expand)


def _columns(num_columns):
    """Columns of h a program makes: the fewest in all, then the fewest blocks."""
    return min((16, 32, 64), key=lambda width: (-(-num_columns // width) * width, -width))


def _shrink(block_m, block_h, plain):
    return Tiles(block_m, block_h, 128 if plain else 32, 4, 3 if plain else 2)


def _split(shrink, num_tokens, in_features, num_sms):
    """More programs where the tiles are too few to fill the GPU; a split shorter than 1024 costs more than it gains."""
    tiles = -(-num_tokens // shrink.block_m)
    return dataclasses.replace(shrink, split=max(1, min(num_sms // tiles, in_features // 1024, 8)))


def _few_rows(num_tokens, in_features, out_features, block_k, num_sms, expand, num_warps):
    block_m = 16 if num_tokens <= 16 else 32 if num_tokens <= 32 else 64
    stages = 3 if block_k >= 64 else 2
    tiles = max(1, -(-out_features // 64))
    base = Tiles(block_m, 64, block_k, num_warps, stages, split=max(1, min(num_sms // tiles, in_features // 1536, 8)))
    shrink = Tiles(16, 16, block_k, 4, stages, split=max(1, min(8, in_features // 1024)))
    return Config("decode", base, shrink, expand)


def _interpreter(num_tokens, num_slots, batch_invariant):
    """Small tiles, so that small tensors have several and tails; every route is reached."""
    if batch_invariant:
        return Config("fused", Tiles(16, 32, 32, 4, 1), Tiles(16, 16, 32, 4, 1), Tiles(16, 32, 0, 4, 1))
    route = "decode" if num_tokens <= 16 else "vendor" if num_tokens < 4 * num_slots else "fused"
    split = 3 if route == "decode" else 2
    return Config(route, Tiles(16, 32, 32, 4, 1, split=2), Tiles(16, 16, 32, 4, 1, split=split), Tiles(16, 32, 0, 4, 1))
