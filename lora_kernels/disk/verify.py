"""Reads a merged checkpoint back: what was not touched is compared byte by byte, what was is computed again.

The recomputation gives the very bits; a few rows of each tensor are also computed in float64 by plain arithmetic, so
that a fault of the kernel would not confirm itself.
"""

import os

import torch
from safetensors import safe_open

from ..io.checkpoint import CheckpointError
from .stream import RowReader, edited_blocks, prepare, read_exactly, segments

_CHUNK = 1 << 20
_ROWS_IN_FLOAT64 = 4


def verify_checkpoint(workers, base, edits, folder, progress, block_bytes):
    """Compares ``folder`` with what merging ``base`` should give.

    Raises:
        CheckpointError: they differ; the message names the tensor or file.
    """
    for shard in base.shards:
        _check_layout(base, shard, folder)
        source, target = (os.open(p, os.O_RDONLY) for p in (base.path(shard), os.path.join(folder, shard)))
        try:
            for start, stop, info in segments(base, shard, edits):
                if info is None:
                    _compare_copied(base, shard, source, target, start, stop, progress)
                else:
                    _compare_edited(workers, source, target, info, edits[info.name], progress, block_bytes)
        finally:
            os.close(source)
            os.close(target)
    for name in base.sidecars:
        with open(base.path(name), "rb") as left, open(os.path.join(folder, name), "rb") as right:
            if left.read() != right.read():
                raise CheckpointError(f"verify: {name} is not a copy of the base's")


def _check_layout(base, shard, folder):
    """The file opens with the safetensors library, which sees the tensors that the base has."""
    wanted = {i.name for i in base.tensors.values() if i.shard == shard}
    try:
        with safe_open(os.path.join(folder, shard), framework="pt") as file:
            found = set(file.keys())
    except Exception as error:
        raise CheckpointError(f"verify: {shard} can not be opened ({error})") from error
    if found != wanted:
        raise CheckpointError(f"verify: {shard} holds other tensors than the base: {sorted(found ^ wanted)[:4]}")


def _compare_copied(base, shard, source, target, start, stop, progress):
    left, right = bytearray(_CHUNK), bytearray(_CHUNK)
    for offset in range(start, stop, _CHUNK):
        count = min(_CHUNK, stop - offset)
        a, b = memoryview(left)[:count], memoryview(right)[:count]
        read_exactly(source, a, offset)
        read_exactly(target, b, offset)
        if left[:count] != right[:count]:
            names = [i.name for i in base.tensors.values() if i.shard == shard and i.start < offset + count <= i.stop]
            raise CheckpointError(f"verify: {shard}: bytes {offset} to {offset + count} differ ({', '.join(names)})")
        progress.advance(count)


def _compare_edited(workers, source, target, info, edit, progress, block_bytes):
    def compare(offset, data):
        found = bytearray(len(data))
        read_exactly(target, memoryview(found), offset)
        if found != data:
            raise CheckpointError(f"verify: '{info.name}' is not what the merge gives (bytes from {offset})")

    ready = prepare(workers, source, info, edit, block_bytes)
    for _, count in edited_blocks(workers, source, ready, block_bytes, compare):
        progress.advance(count)
    if not info.is_floating or any(term.magnitude is not None for term in ready.terms):
        return
    original, merged = RowReader(source, info, block_bytes), RowReader(target, info, block_bytes)
    step = max(1, info.matrix[0] // _ROWS_IN_FLOAT64)
    for row in range(0, info.matrix[0], step):
        _check_row(original.read(row, 1), merged.read(row, 1), row, ready)


def _check_row(original, merged, row, ready):
    """One row against float64: off by one rounding to its dtype and the noise of a float32 sum at most."""
    exact = ready.base_rows(original, row).double()
    size = exact.abs()
    for term in ready.terms:
        if term.row <= row < term.stop:
            left, right = term.left[row - term.row : row - term.row + 1].double(), term.right.double()
            exact = exact + term.scale * (left @ right)
            size = size + abs(term.scale) * (left.abs() @ right.abs())
    limits = torch.finfo(merged.dtype)
    allowed = exact.abs() * limits.eps + size * 64 * torch.finfo(torch.float32).eps + limits.tiny
    if ((merged.double() - exact).abs() > allowed).any():
        raise CheckpointError(
            f"verify: row {row} of '{ready.info.name}' is further from float64 than rounding explains"
        )
