"""Tiles of the training kernels: pure functions of sizes, dtypes and GPU. See triton_train_kernels.py.

What a row of dX is made of never depends on the number of rows unless the tiles of ``input_gradient`` do; those are
fixed under ``batch_invariant``.
"""

import dataclasses

from .config import Config

LARGE_MEMORY = ((8, 0), (9, 0), (10, 0), (10, 3))  # 160 KiB or more of shared memory a block


@dataclasses.dataclass(frozen=True)
class SkinnyConfig:
    """Rows of a step, columns of a strip, ranks of a block, parts of the rows."""

    block_m: int
    block_n: int
    block_r: int
    split: int
    num_warps: int
    num_stages: int


def block_rank(rank, widest=64):
    """(width, blocks): the fewest columns in all, then the fewest blocks; a width is a power of two from 16."""
    widths = [width for width in (16, 32, 64) if width <= widest]
    width = min(widths, key=lambda w: (-(-rank // w) * w, -w))
    return width, -(-rank // width)


def dx_block_rank(rank, mixed, crowded):
    """:func:`block_rank`'s width in the GEMM that makes dX; ``crowded``: registers are short. Several adapters have a
    second sum there, several projections a K loop each, and wide tiles spill under Triton 3.6."""
    return block_rank(rank, 16 if mixed or crowded else 64)[0]


def skinny(num_rows, strips_of, rank, num_slots, itemsize, mixed, masked, aligned, capability, num_sms):
    """The :class:`SkinnyConfig` of a skinny product. Pure.

    Args:
        num_rows, rank, num_slots: rows of the tall matrix, columns of the thin one, adapters.
        strips_of: function of ``block_n`` that returns the number of strips.
        itemsize: bytes of an element of the tall matrix.
        mixed: the thin matrix is float32 and the tall one is not.
        masked: the tall matrix is read through a dropout mask.
        aligned: the tall matrix can be read 16 bytes at a time.
        capability, num_sms: of the GPU; (0, 0) is the interpreter, which gets small tiles.
    """
    if capability == (0, 0):
        block_m, block_n, warps, stages, widest = 16, 32, 4, 1, 64
    elif itemsize == 4 or mixed:
        block_m, block_n, warps, stages, widest = 32, 64, 4, 2, 16
    elif not aligned:  # its reads can not be asynchronous: stages would fetch nothing ahead and cost registers
        block_m, block_n, warps, stages, widest = 64, 128, 8, 1, 64
    elif masked or capability not in LARGE_MEMORY or (num_slots > 1 and capability != (9, 0)):  # 256 columns spill
        block_m, block_n, warps, stages, widest = 64, 128, 8, 2, 64
    else:
        block_m, block_n, warps, stages, widest = 64, 256, 8, 3, 64
    width, blocks = block_rank(rank, widest)
    if masked and capability == (9, 0) and widest == 64:  # the ranks are rows of the product there: wgmma wants 64
        width, blocks = 64, -(-rank // 64)
    programs = max(1, strips_of(block_n) * blocks * num_slots)
    # A part of fewer than four steps costs more in planes than it gains; two programs a multiprocessor fill the GPU.
    split = max(1, min(2 * num_sms // programs, num_rows // (4 * block_m), 64))
    if capability == (0, 0):
        split = 3
    return SkinnyConfig(block_m, block_n, width, split, warps, stages)


def input_gradient(num_rows, itemsize, mixed, masked, aligned, several, capability, batch_invariant):
    """The :class:`~.config.Config` of the GEMM that makes dX. Pure; arguments as of :func:`skinny`.

    Args:
        aligned: dY and the weight can be read, and dX written, 16 bytes at a time.
        several: the rows belong to several adapters.
        batch_invariant: nothing may depend on num_rows.
    """
    if capability == (0, 0):
        return Config("dx", 16, 32, 32, 4, 1, tma=num_rows > 32 and not batch_invariant, group_m=2)
    if itemsize == 4:
        return Config("dx", 64, 64, 32, 8, 2)
    wgmma = capability >= (9, 0) and capability in LARGE_MEMORY
    if not aligned or batch_invariant or num_rows <= 64:
        return Config("dx", 64, 128, 32, 8, 2)
    if mixed and not wgmma:
        return Config("dx", 64, 64, 32, 4, 2)
    if not wgmma and masked:  # 128 columns spill under Triton 3.6
        return Config("dx", 128, 64, 32, 8, 3 if capability in LARGE_MEMORY else 2)
    if not wgmma:
        return Config("dx", 128, 128, 32, 8, 3 if capability in LARGE_MEMORY else 2)
    if mixed and several and capability >= (10, 0):  # 128 columns spill
        return Config("dx", 128, 64, 64, 8, 3, tma=True)
    if num_rows <= 512 or mixed or masked or several:
        return Config("dx", 128, 128, 64, 8, 3, tma=True)
    return Config("dx", 128, 256, 64, 8, 3, tma=True)
