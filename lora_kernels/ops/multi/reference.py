"""``multi_lora_linear`` and its parts in plain torch: the base product over all rows, then one segment a slot.

Rows are gathered a slot at a time, so an Inf or NaN in one adapter reaches no other adapter's rows, and only
the live rank of a slot is computed. Signatures are the ops' own; segment bounds are read on the host.
"""

import torch
import torch.nn.functional as F

from ..linear.reference import by_rows, expand_, lora_linear_backward, shrink
from ..wide import wide_dtype


def _segments(row_order, segment_starts, num_rows):
    """[(slot, its rows)] of the slots that have rows."""
    starts = segment_starts.tolist()
    order = row_order[: starts[-1]].long()
    order_of = [(slot, order[starts[slot + 1] : starts[slot + 2]]) for slot in range(len(starts) - 2)]
    return [(slot, rows[rows < num_rows]) for slot, rows in order_of if rows.numel()]


def _live(slot_ranks, slot, max_rank, num_slices):
    """Live rank of each slice of a slot."""
    if slot_ranks is None:
        return [max_rank] * num_slices
    ranks = slot_ranks[slot].reshape(-1).tolist()
    return ranks if len(ranks) == num_slices else ranks * num_slices


def _columns(num_columns, out_splits):
    bounds, start = [], 0
    for width in out_splits or [num_columns]:
        bounds.append(slice(start, start + width))
        start += width
    return bounds


def lora_shrink(x, a_bank, slot_ranks, row_order, segment_starts, batch_invariant):
    with torch.no_grad():
        h = torch.zeros((x.shape[0], *a_bank.shape[1:-1]), dtype=wide_dtype(x), device=x.device)
        h_slices = h if h.dim() == 3 else h.unsqueeze(1)
        no_mask = torch.empty(0, dtype=torch.uint8, device=x.device)
        for slot, rows in _segments(row_order, segment_starts, x.shape[0]):
            a = a_bank[slot] if a_bank.dim() == 4 else a_bank[slot : slot + 1]
            for index, rank in enumerate(_live(slot_ranks, slot, a.shape[1], a.shape[0])):
                for group in rows.split(1) if batch_invariant else [rows]:
                    h_slices[group, index, :rank] = shrink(x[group], a[index, :rank], no_mask, 0.0)
        return h


def lora_expand_(y, h, b_bank, slot_scalings, slot_ranks, row_order, segment_starts, out_splits, batch_invariant):
    with torch.no_grad():
        columns = _columns(y.shape[1], out_splits)
        h_slices = h if h.dim() == 3 else h.unsqueeze(1)
        for slot, rows in _segments(row_order, segment_starts, y.shape[0]):
            for index, rank in enumerate(_live(slot_ranks, slot, b_bank.shape[-1], len(columns))):
                for group in rows.split(1) if batch_invariant else [rows]:
                    block = y[group, columns[index]]
                    b = b_bank[slot, columns[index], :rank]
                    expand_(block, h_slices[group, index, :rank], h.new_empty(0), b, slot_scalings[slot], None)
                    y[group, columns[index]] = block


def _base(x, weight, bias, batch_invariant):
    return by_rows(lambda rows: F.linear(rows, weight, bias), x, batch_invariant)


def multi_lora_linear(
    x,
    weight,
    bias,
    a_bank,
    b_bank,
    slot_scalings,
    slot_ranks,
    row_order,
    segment_starts,
    out_splits,
    batch_invariant,
):
    with torch.no_grad():
        y = _base(x, weight, bias, batch_invariant)
        plan = (row_order, segment_starts)
        h = lora_shrink(x, a_bank, slot_ranks, *plan, batch_invariant)
        lora_expand_(y, h, b_bank, slot_scalings, slot_ranks, *plan, out_splits, batch_invariant)
        return y


def multi_lora_linear_list(
    x, weight, bias, lora_a, lora_b, slot_scalings, row_order, segment_starts, out_splits, batch_invariant
):
    with torch.no_grad():
        y = _base(x, weight, bias, batch_invariant)
        no_mask = torch.empty(0, dtype=torch.uint8, device=x.device)
        for slot, rows in _segments(row_order, segment_starts, x.shape[0]):
            for group in rows.split(1) if batch_invariant else [rows]:
                block = y[group]
                h = shrink(x[group], lora_a[slot], no_mask, 0.0)
                expand_(block, h, lora_a[slot], lora_b[slot], slot_scalings[slot], out_splits)
                y[group] = block
        return y


def multi_lora_backward(
    dy, x, weight, lora_a, lora_b, slot_scalings, row_order, segment_starts, out_splits, da, db, need_x
):
    with torch.no_grad():
        dx = x.new_empty(0)
        if need_x:
            dx = x.new_zeros(x.shape) if weight is None else (dy @ weight).to(x.dtype)
        for grad in (*da, *db):
            grad.zero_()
        no_mask = torch.empty(0, dtype=torch.uint8, device=x.device)
        for slot, rows in _segments(row_order, segment_starts, x.shape[0]):
            a, b, x_rows = lora_a[slot], lora_b[slot], x[rows]
            h = shrink(x_rows, a, no_mask, 0.0)
            slot_dx, slot_da, slot_db = lora_linear_backward(
                dy[rows], x_rows, None, a, b, slot_scalings[slot], h, no_mask, 0.0, out_splits,
                need_x, bool(da), bool(db), False,
            )  # fmt: skip
            if need_x:
                dx[rows] += slot_dx
            if da:
                da[slot].copy_(slot_da)
            if db:
                db[slot].copy_(slot_db)
        return dx


KERNELS = {
    "multi_lora_linear": multi_lora_linear,
    "multi_lora_linear_list": multi_lora_linear_list,
    "multi_lora_backward": multi_lora_backward,
    "lora_shrink": lora_shrink,
    "lora_expand_": lora_expand_,
}
