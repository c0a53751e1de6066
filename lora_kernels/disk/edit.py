"""The arithmetic of one tensor, a block of rows at a time, so that memory stays small and the block stays in cache.

The result is the same bits whatever the blocks are: each element has its own sum, accumulated in float32 in the order
of the ranks and rounded once.
"""

import itertools
from dataclasses import dataclass, field, replace

import torch

from .. import ops
from ..io.checkpoint import CheckpointError
from .start import from_original


@dataclass
class Term:
    """``scale · left · right`` added to rows ``row``… With ``magnitude``, DoRA's rescaling by ``weight``.

    ``start``: None, or (kind, scaling) of an adapter that took a part of these rows out of them when it was made.
    """

    row: int
    left: torch.Tensor
    right: torch.Tensor
    scale: float
    weight: float = 1.0
    magnitude: torch.Tensor = None
    transposed: bool = False  # the weight is: ``left`` is Aᵀ, and a magnitude belongs to columns
    start: tuple = None

    @property
    def stop(self):
        return self.row + self.left.shape[0]


@dataclass
class Edit:
    """What is done to one tensor: ``parts`` (first row -> what replaces the rows from there), then ``rows`` (number ->
    row; both of its dtype) or ``terms``."""

    parts: dict = field(default_factory=dict)
    replaced_by: str = ""
    rows: dict = field(default_factory=dict)
    terms: list[Term] = field(default_factory=list)


class TensorEdit:
    """An :class:`Edit` made ready for the blocks of a tensor; ``terms`` are then relative to the original rows.

    Args:
        info: TensorInfo of the tensor.
        edit: Edit.
        read: (first row, rows) -> tensor of the original rows; DoRA on a transposed weight reads all of them once, and
            so does an adapter that started from them.
    """

    def __init__(self, info, edit, read, block_rows):
        self.info, self.rows = info, edit.rows
        parts = [(row, part) for row, part in edit.parts.items() if part.numel()]
        self.parts = [(row, part.reshape(-1, info.matrix[1])) for row, part in parts]
        terms = [from_original(term, info, read, block_rows) for term in edit.terms]
        self.terms = [replace(term, right=term.right.contiguous()) for term in terms]
        self._norms = {}
        for i, term in enumerate(self.terms):
            if term.magnitude is not None and term.transposed:
                self._norms[i] = self._column_norms(term, read, block_rows)
        self._spans = _spans(self.terms)

    def base_rows(self, rows, row):
        """The rows before the terms: the original ones, or those that replace them. ``rows`` is written."""
        for start, part in self.parts:
            first, last = max(start, row), min(start + len(part), row + rows.shape[0])
            if first < last:
                rows[first - row : last - row] = part[first - start : last - start]
        for number, own in self.rows.items():
            if row <= number < row + rows.shape[0]:
                rows[number - row] = own
        return rows

    def apply_(self, rows, row):
        """Edits ``rows`` (n, columns), which start at row ``row`` of the tensor, in place.

        Raises:
            CheckpointError: the result is not finite.
        """
        self.base_rows(rows, row)
        for start, stop, terms in self._spans:
            first, last = max(start, row), min(stop, row + rows.shape[0])
            if first < last:
                self._apply_span(rows[first - row : last - row], first, last, terms)
        return rows

    def _apply_span(self, rows, first, last, terms):
        if any(term.magnitude is not None for _, term in terms):
            merged = self._with_dora(rows, first, last, terms)
            if not merged.isfinite().all():
                raise CheckpointError(f"'{self.info.name}': the merged weight would hold Inf or NaN (a row of norm 0?)")
            rows.copy_(merged)
            return
        left, right, scale = _joined([term for _, term in terms], first, last, rows.dtype)
        try:
            ops.merge_(rows, right, left, scale, safe=True)
        except ValueError as error:
            raise CheckpointError(f"'{self.info.name}': {error}") from error

    def _with_dora(self, rows, first, last, terms):
        base = rows.float()
        merged = base.clone()
        # Rescaled weights first: with a weight of 1 what they replace cancels exactly.
        for i, term in sorted(terms, key=lambda t: t[1].magnitude is None):
            update = _update(term, first, last)
            if term.magnitude is None:
                merged += update
                continue
            update += base
            magnitude = term.magnitude.float()
            if term.transposed:
                factor = magnitude / self._norms[i]
            else:
                norms = torch.linalg.vector_norm(update, dim=1, dtype=torch.float64).float()
                factor = (magnitude[first - term.row : last - term.row] / norms)[:, None]
            merged.sub_(base, alpha=term.weight).add_(update.mul_(factor), alpha=term.weight)
        return merged.to(rows.dtype)

    def _column_norms(self, term, read, block_rows):
        squares = torch.zeros(self.info.matrix[1], dtype=torch.float64)
        for row in range(0, self.info.matrix[0], block_rows):
            rows = self.base_rows(read(row, min(block_rows, self.info.matrix[0] - row)), row)
            update = _update(term, row, row + rows.shape[0]).add_(rows)
            squares += torch.linalg.vector_norm(update, dim=0, dtype=torch.float64).square_()
        return squares.sqrt_().float()


def _update(term, first, last):
    left = term.left[first - term.row : last - term.row].float()
    return (left * term.scale) @ term.right.float()


def _spans(terms):
    """[(first row, last row, terms on all these rows as (index, term))]: each row lies in one of them at most."""
    cuts = sorted({edge for term in terms for edge in (term.row, term.stop)})
    spans = []
    for start, stop in itertools.pairwise(cuts):
        inside = [(i, t) for i, t in enumerate(terms) if t.row <= start and stop <= t.stop]
        if inside:
            spans.append((start, stop, inside))
    return spans


def _joined(terms, first, last, dtype):
    """One (left, right, scale) for all terms: their ranks side by side, so that the sum is rounded once."""
    parts = [term.left[first - term.row : last - term.row] for term in terms]
    if len(terms) == 1:
        wanted = dtype if parts[0].dtype == terms[0].right.dtype == dtype else torch.float32
        return parts[0].to(wanted).contiguous(), terms[0].right.to(wanted).contiguous(), float(terms[0].scale)
    left = torch.cat([part.float() * term.scale for part, term in zip(parts, terms)], dim=1)
    return left, torch.cat([term.right.float() for term in terms]), 1.0
