"""Which Triton kernels and tiles run projections that share x: a pure function of sizes, dtype and GPU.

``decode`` (few rows, inference): one launch. ``two_pass``: one shrink, then one launch of all GEMMs. ``apart``: a
projection at a time, each with the kernels of its own sizes.
"""

import dataclasses

from ..linear import config as linear

FEW_ROWS = 64  # up to here the weights' bytes are what counts, and a decode kernel streams them best
MOST_WEIGHTS = 4  # a kernel takes descriptors of no more
APART = linear.Config("apart", 0, 0, 0, 0, 0)


def choose(
    num_tokens, in_features, widths, rank, itemsize, capability, *, keep_h=False, num_sms=132, batch_invariant=False,
    aligned=True, by_rows=True, mixed=False,
):  # fmt: skip
    """The :class:`~..linear.config.Config` of a call. Pure; arguments as of :func:`~..linear.config.choose`.

    Args:
        widths: out_features of each projection.
        rank: the largest.
        keep_h: training: h has to come out.
    """
    rules = {"num_sms": num_sms, "aligned": aligned, "by_rows": by_rows, "mixed": mixed}
    if num_tokens <= FEW_ROWS and not (keep_h or batch_invariant):
        tiles = linear.choose(num_tokens, in_features, sum(widths), rank, itemsize, capability, **rules)
        if tiles.path != "decode" or tiles.split_k > 1:  # all columns do not fill the GPU: K is split for each
            return APART
        # Four warps of several projections spill a few bytes on sm_100, and where every element needs an address.
        return dataclasses.replace(tiles, num_warps=8) if capability >= (10, 0) or not aligned else tiles
    # Where every element needs an address of its own, larger tiles of several projections spill.
    small = batch_invariant or not aligned or len(widths) > MOST_WEIGHTS
    sizes, width = (itemsize, capability), min(widths, key=lambda width: (width % 16 == 0, -width))
    for held in (rank, linear.DECODE_RANK + 1):  # a rank too large for one pass
        tiles = linear.choose(num_tokens, in_features, width, held, *sizes, batch_invariant=small, **rules)
        if tiles.path == "two_pass":
            break
    return tiles


def takes(tiles, num_tokens, rank, keep_h):
    """Whether a configuration that was measured can run so many rows and ranks: what a file says is not trusted."""
    return linear.takes(tiles, num_tokens, rank) and (tiles.path == "two_pass" or not keep_h)
