"""Adapters that started from the weight: PiSSA and OLoRA took the part ``s · B0 A0`` out of it and trained on.

Their update of the weight as it is in the checkpoint is ``s · (B A − B0 A0)``. The checkpoint of an adapter does not
hold B0 and A0; the decomposition that gave them is made again, of one weight at a time.
"""

from dataclasses import replace

import torch

from ..initial import leading_part
from ..io.checkpoint import CheckpointError
from .adapter import WAY_AROUND


def from_original(term, info, read, block_rows):
    """The term with the ranks of its start beside its own: ``[B | −B0] [A ; A0]``, for the rows as they are on disk.

    Args:
        term: Term.
        info: TensorInfo of the tensor.
        read: (first row, rows) -> tensor of these rows.

    Raises:
        CheckpointError: the weight does not determine what was taken out.
    """
    if term.start is None:
        return term
    matrix = torch.empty(term.left.shape[0], info.matrix[1])
    for row in range(term.row, term.stop, block_rows):
        count = min(block_rows, term.stop - row)
        matrix[row - term.row : row - term.row + count] = read(row, count)
    matrix = matrix.t() if term.transposed else matrix
    kind, scaling = term.start
    rank = term.left.shape[1]
    a, b = leading_part(matrix, rank + 1, scaling, kind)
    if kind == "pissa" and len(a) > rank:
        _check_gap(info.name, rank, scaling * a.square().sum(1))
    a, b = a[:rank], b[:, :rank]
    left, right = (-a.t(), b.t()) if term.transposed else (-b, a)
    return replace(
        term, left=torch.cat([term.left.float(), left], 1), right=torch.cat([term.right.float(), right]), start=None
    )


def _check_gap(name, rank, values):
    """CheckpointError where the rank cuts through equal singular values: which part was taken out is then chance."""
    noise = 16 * torch.finfo(values.dtype).eps * values[0]
    if values[rank - 1] > noise and values[rank - 1] - values[rank] <= noise:
        raise CheckpointError(
            f"'{name}': singular values {rank} and {rank + 1} are equal, so init_lora_weights='pissa' does not say "
            f"which part was taken out; {WAY_AROUND}"
        )
