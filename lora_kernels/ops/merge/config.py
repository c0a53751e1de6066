"""Tiles of the merge kernel: a pure function of dtypes and layout. See triton_kernels.py."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows and columns of the weight that a program owns."""

    block_m: int
    block_n: int
    num_warps: int


def choose(itemsize, precision, strided, interpreted):
    """The :class:`Tiles` of a call. Pure.

    Products of float32 factors run on the plain units, and a weight whose elements are apart needs an address each:
    both take more registers. The rest goes to mma.sync: bound by memory, a wider instruction would gain nothing.
    """
    if interpreted:
        return Tiles(32, 32, 4)
    if precision == "ieee" or itemsize == 4 or strided:
        return Tiles(32, 64, 4)
    return Tiles(32, 128, 4)
