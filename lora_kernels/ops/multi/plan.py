"""``BatchPlan``: which rows of a batch belong to which slot, sorted once and used by every layer."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks


@dataclasses.dataclass
class BatchPlan:
    """Rows of a batch grouped by slot. Tensors have fixed maximum sizes, so that a plan can be refilled.

    Attributes:
        token_slots: int32 (max_tokens), slot of each row; −1 is base only, ``num_slots`` marks unused places.
        row_order: int32 (max_tokens), row indices sorted by slot (stable), unused places last.
        segment_starts: int32 (num_slots + 2); slot ``s`` owns ``row_order[starts[s + 1]:starts[s + 2]]``,
            the base-only rows are ``row_order[:starts[1]]``.
        slot_ranks: int32 (num_slots) or (num_slots, slices), live rank of each slot, or None for full rank.
        num_tokens: rows of the batch that the plan was last filled for.
        num_slots: slots of the bank.
    """

    token_slots: torch.Tensor
    row_order: torch.Tensor
    segment_starts: torch.Tensor
    slot_ranks: torch.Tensor | None
    num_tokens: int
    num_slots: int

    @classmethod
    def empty(
        cls, max_tokens: int, num_slots: int, max_rank: int | None = None, device: torch.device | str | None = None
    ) -> "BatchPlan":
        """A plan with room for ``max_tokens`` rows, to be filled by ``plan_batch(..., out=plan)``.

        ``max_rank`` given: every slot starts with that live rank.
        """
        for name, value in (("max_tokens", max_tokens), ("num_slots", num_slots)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: expected a whole number >= 0, got {value!r}")
        return cls(
            token_slots=torch.full((max_tokens,), num_slots, dtype=torch.int32, device=device),
            row_order=torch.arange(max_tokens, dtype=torch.int32, device=device),
            segment_starts=torch.zeros(num_slots + 2, dtype=torch.int32, device=device),
            slot_ranks=None
            if max_rank is None
            else torch.full((num_slots,), max_rank, dtype=torch.int32, device=device),
            num_tokens=0,
            num_slots=num_slots,
        )

    @property
    def max_tokens(self) -> int:
        """Rows that fit into the plan."""
        return self.token_slots.shape[0]


def plan_batch(
    token_slots: Tensor | Sequence[int],
    slot_ranks: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    *,
    num_slots: int | None = None,
    out: BatchPlan | None = None,
) -> BatchPlan:
    """Sorts the rows of a batch by slot. No host sync for slots that live on a GPU.

    Args:
        token_slots: (num_tokens) integer tensor or sequence; the slot of each row, −1 for base only.
        slot_ranks: (num_slots) or (num_slots, slices) integer tensor or sequence of live ranks; None: full rank.
        num_slots: slots of the bank; taken from ``out`` or ``slot_ranks``, else the largest slot + 1.
        out: a plan of ``BatchPlan.empty`` to refill in place.

    Raises:
        TypeError: what is no tensor nor sequence of integers, or an ``out`` that is no plan.
        ValueError: a slot outside −1 … num_slots − 1 (checked where that needs no sync), too many rows for
            ``out``, or sizes that disagree.
    """
    if out is not None and not isinstance(out, BatchPlan):
        raise TypeError(f"out: expected a BatchPlan (see BatchPlan.empty), got {type(out).__name__}")
    if num_slots is not None and (not isinstance(num_slots, int) or num_slots < 0):
        raise ValueError(f"num_slots: expected a whole number >= 0, got {num_slots!r}")
    device = out.token_slots.device if out is not None else None
    slots = token_slots if isinstance(token_slots, torch.Tensor) else _from_sequence(token_slots)
    if slots.dim() != 1 or slots.is_floating_point() or slots.dtype == torch.bool:
        raise ValueError(f"token_slots: expected a 1-D integer tensor, got {slots.dtype} {tuple(slots.shape)}")
    ranks = None if slot_ranks is None else _ranks(slot_ranks)
    num_slots = _num_slots(slots, ranks, num_slots, out)
    if slots.device.type == "cpu" and slots.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in torch.aminmax(slots))
        if low < -1 or high >= num_slots:
            raise ValueError(f"token_slots: expected slots from -1 to {num_slots - 1}, got {low} to {high}")
    slots = slots.to(device=device or slots.device, dtype=torch.int32)
    if out is None:
        out = BatchPlan.empty(slots.shape[0], num_slots, None, slots.device)
    elif slots.shape[0] > out.max_tokens:
        raise ValueError(f"token_slots: expected at most {out.max_tokens} rows (out), got {slots.shape[0]}")
    _fill(out, slots, ranks)
    return out


def _ranks(slot_ranks):
    try:
        ranks = torch.as_tensor(slot_ranks)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"slot_ranks: expected whole numbers, got {slot_ranks!r:.80}") from None
    if ranks.dim() not in (1, 2):
        raise ValueError(f"slot_ranks: expected (num_slots) or (num_slots, slices), got {tuple(ranks.shape)}")
    if ranks.numel() and (ranks.is_floating_point() or ranks.is_complex() or ranks.dtype is torch.bool):
        raise ValueError(f"slot_ranks: expected whole numbers, got {ranks.dtype}")
    known = ranks.device.type == "cpu" and ranks.numel() and not torch.compiler.is_compiling()
    if known and int(ranks.min()) < 0:
        raise ValueError(f"slot_ranks: expected ranks >= 0, got {int(ranks.min())}")
    return ranks.to(torch.int32)


def _from_sequence(token_slots):
    try:
        return torch.tensor(list(token_slots)) if len(token_slots) else torch.empty(0, dtype=torch.int32)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"token_slots: expected integers, -1 for base only, got {token_slots!r:.80}") from None


def _num_slots(slots, ranks, num_slots, out):
    given = {
        "num_slots": num_slots,
        "slot_ranks": None if ranks is None else ranks.shape[0],
        "out": None if out is None else out.num_slots,
    }
    known = {name: value for name, value in given.items() if value is not None}
    if len(set(known.values())) > 1:
        raise ValueError(f"num_slots: the sizes disagree: {known}")
    if known:
        return next(iter(known.values()))
    return int(slots.max()) + 1 if slots.numel() else 0


def _fill(plan, slots, ranks):
    num_tokens = slots.shape[0]
    plan.token_slots[:num_tokens] = slots
    plan.token_slots[num_tokens:] = plan.num_slots
    by_slot, order = torch.sort(plan.token_slots, stable=True)
    plan.row_order.copy_(order)
    bounds = torch.arange(-1, plan.num_slots + 1, dtype=torch.int32, device=slots.device)
    plan.segment_starts.copy_(torch.searchsorted(by_slot, bounds))
    if ranks is None:
        plan.slot_ranks = None
    elif plan.slot_ranks is not None and plan.slot_ranks.shape == ranks.shape:
        plan.slot_ranks.copy_(ranks)
    else:
        plan.slot_ranks = ranks.to(slots.device, copy=True)
    plan.num_tokens = num_tokens


def check_plan(plan, num_rows, num_slots, num_slices):
    """The plan is for this batch and this bank; ``num_slices``: None where its ranks do not count."""
    if not isinstance(plan, BatchPlan):
        raise TypeError(f"plan: expected a BatchPlan (see plan_batch), got {type(plan).__name__}")
    if plan.num_tokens != num_rows:
        raise ValueError(f"plan: made for {plan.num_tokens} rows, x has {num_rows}")
    if plan.num_slots != num_slots:
        raise ValueError(f"plan: made for {plan.num_slots} slots, the bank has {num_slots}")
    if plan.slot_ranks is not None:
        checks.tensor("plan.slot_ranks", plan.slot_ranks, 1, 2)
        shape = tuple(plan.slot_ranks.shape)
        if shape[0] != num_slots:
            raise ValueError(f"plan.slot_ranks: expected {num_slots} slots, got shape {shape}")
        if num_slices is not None and shape[1:] not in ((), (1,), (num_slices,)):
            expected = f"(num_slots) or (num_slots, slices = {num_slices})"
            raise ValueError(f"plan.slot_ranks: expected {expected}, got shape {shape}")
