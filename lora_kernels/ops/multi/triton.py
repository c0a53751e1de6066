"""The multi-adapter ops on Triton: which kernels, which grids. See triton_kernels.py and config.py.

Adapters of a list are handed to the kernels as a tuple of pointers, padded to a power of two so that few variants are
compiled: no table to copy to the device, and one launch for all slots. More than 64 are packed into a bank.
"""

import dataclasses

import torch
import torch.nn.functional as F
import triton

from .. import triton_host as host
from .. import tuning
from . import config, triton_kernels

_MAX_LISTED = 64


@dataclasses.dataclass
class Side:
    """One factor of all slots as the kernels take it; ``bank`` and ``ranks`` are tuples for a list.

    Attributes:
        strides: of A: slot, slice, rank, element; of B: slot, row, element. Of a list only the last counts.
        rank_strides: of ``ranks``: slot, slice.
        one: a tensor whose dtype stands for all.
    """

    bank: object
    ranks: object
    strides: tuple
    rank_strides: tuple
    one: torch.Tensor
    num_slots: int
    num_slices: int
    max_rank: int

    @property
    def switches(self):
        listed = len(self.bank) if isinstance(self.bank, tuple) else 0
        return {"HAS_RANKS": isinstance(self.ranks, torch.Tensor), "NUM_LISTED": listed}

    @property
    def columns(self):
        return self.num_slices * self.max_rank


def _rank_strides(slot_ranks):
    if slot_ranks is None:
        return 0, 0
    return slot_ranks.stride(0), slot_ranks.stride(1) if slot_ranks.dim() == 2 else 0


def bank_a(a_bank, slot_ranks):
    bank = a_bank if a_bank.dim() == 4 else a_bank.unsqueeze(1)
    num_slots, num_slices, max_rank, _ = bank.shape
    return Side(
        bank,
        slot_ranks,
        bank.stride(),
        _rank_strides(slot_ranks),
        bank[:1].flatten(0, 2),
        num_slots,
        num_slices,
        max_rank,
    )


def bank_b(b_bank, slot_ranks, num_slices):
    num_slots, _, max_rank = b_bank.shape
    strides = b_bank.stride()
    return Side(b_bank, slot_ranks, strides, _rank_strides(slot_ranks), b_bank, num_slots, num_slices, max_rank)


def listed(lora_a, lora_b, num_slices):
    """(A, B), a :class:`Side` each, of a list of adapters; of two dtypes they meet in float32."""
    if len({tensor.dtype for tensor in (*lora_a, *lora_b)}) > 1:
        lora_a, lora_b = [t.float() for t in lora_a], [t.float() for t in lora_b]
    ranks = [tensor.shape[-2] for tensor in lora_a]
    padded = triton.next_power_of_2(len(ranks))
    strides = ((0, 0, 0, 1), (0, 0, 1))
    sides = []
    for tensors, stride in zip((lora_a, lora_b), strides, strict=True):
        tensors = [host.packed(tensor) for tensor in tensors]
        tensors += tensors[-1:] * (padded - len(tensors))
        full = (*ranks, *ranks[-1:] * (padded - len(ranks)))
        sides.append(Side(tuple(tensors), full, stride, (0, 0), tensors[0], len(ranks), num_slices, max(ranks)))
    return sides


def _bank_of(lora_a, lora_b):
    """(a_bank, b_bank) with the adapters of a list, padded with zeros to the largest rank."""
    ranks = [tensor.shape[-2] for tensor in lora_a]
    dtype = torch.float32 if len({tensor.dtype for tensor in (*lora_a, *lora_b)}) > 1 else lora_a[0].dtype
    device, largest = lora_a[0].device, max(ranks)
    a_bank = torch.zeros((len(ranks), *lora_a[0].shape[:-2], largest, lora_a[0].shape[-1]), dtype=dtype, device=device)
    b_bank = torch.zeros((len(ranks), lora_b[0].shape[0], largest), dtype=dtype, device=device)
    for slot, rank in enumerate(ranks):
        a_bank[slot, ..., :rank, :] = lora_a[slot]
        b_bank[slot, :, :rank] = lora_b[slot]
    # Dead columns are zeros that were written here: they may be computed, and no ranks need go to the device.
    return a_bank, b_bank


def _config(op, x, weight, out_features, a, batch_invariant):
    """What was measured for the op on this GPU, else the rule's: of the two halves the :class:`~.config.Tiles`."""
    aligned = host.aligned(x) and (weight is None or host.aligned(weight))
    plain = host.precision(x, a.one) == "ieee" or a.one.dtype == x.dtype
    sizes = (*x.shape, out_features, a.columns, a.num_slots, x.element_size())
    if aligned and plain and not batch_invariant:
        found = tuning.measured(op, host.gpu_name(x), **dict(zip("MKNCLB", sizes, strict=True)))
        if found is not None:
            return found
    found = config.choose(
        *sizes, host.capability(x), num_sms=host.num_sms(x), batch_invariant=batch_invariant, aligned=aligned,
        plain=plain, by_rows=weight is None or weight.stride(1) == 1,
    )  # fmt: skip
    return {"lora_shrink": found.shrink, "lora_expand_": found.expand}.get(op, found)


def _tiles_of_slots(num_rows, block_m, num_slots):
    """The most tiles that rows can fall into when none holds rows of two of ``num_slots`` slots."""
    return min(num_rows, num_rows // block_m + min(num_slots, num_rows))


def _block_slots(num_slots):
    return triton.next_power_of_2(max(num_slots, 1) + 1)


def _block_rank(max_rank, precision):
    """Columns of h that one step of an update takes: few, for they are added up in registers as float32."""
    return 16 if precision != "tf32" else min(32, max(16, triton.next_power_of_2(max_rank)))


def _planes(x, a, split):
    return torch.empty((split, x.shape[0], a.columns), dtype=torch.float32, device=x.device)


def _shrink(planes, x, a, row_order, segment_starts, tiles):
    split, num_rows, num_columns = planes.shape
    grid = (_tiles_of_slots(num_rows, tiles.block_m, a.num_slots), -(-num_columns // tiles.block_n), split)
    if 0 in grid:
        return
    triton_kernels.multi_shrink_kernel[grid](
        planes, x, a.bank, a.ranks, row_order, segment_starts, num_rows, x.shape[1], num_columns, a.max_rank,
        a.num_slots, *x.stride(), *a.strides, *a.rank_strides, **a.switches,
        EVEN_K=x.shape[1] % tiles.block_k == 0, SPLIT=split,
        LOW_PRECISION=host.precision(x, a.one), UPCAST=host.upcast(x, a.one),
        BLOCK_M=tiles.block_m, BLOCK_H=tiles.block_n, BLOCK_K=tiles.block_k, BLOCK_SLOTS=_block_slots(a.num_slots),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def _widths(out_splits):
    return {"WIDTHS": tuple(out_splits or ()), "NUM_SLICES": len(out_splits or ())}


def _expand(y, planes, b, slot_scalings, row_order, segment_starts, out_splits, tiles, like):
    split, num_rows, num_columns = planes.shape
    low = host.precision(like, b.one)
    columns = sum(-(-width // tiles.block_n) for width in out_splits or (y.shape[1],))
    grid = (_tiles_of_slots(num_rows, tiles.block_m, b.num_slots), columns)
    if 0 in grid:
        return
    triton_kernels.multi_expand_kernel[grid](
        y, planes, b.bank, b.ranks, slot_scalings, row_order, segment_starts,
        num_rows, y.shape[1], num_columns, b.max_rank, b.num_slots, *y.stride(), *b.strides, *b.rank_strides,
        **_widths(out_splits), **b.switches, SPLIT=split, LOW_PRECISION=low, UPCAST=host.upcast(y, b.one),
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_R=_block_rank(b.max_rank, low),
        BLOCK_SLOTS=_block_slots(b.num_slots), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def _fused(y, x, weight, bias, a, b, slot_scalings, row_order, segment_starts, out_splits, tiles):
    planes, base = _planes(x, a, tiles.shrink.split), tiles.base
    _shrink(planes, x, a, row_order, segment_starts, tiles.shrink)
    low = host.precision(x, a.one, b.one)
    tiles_n = host.tiles_n(weight, out_splits, base.block_n)
    triton_kernels.multi_fused_kernel[(-(-x.shape[0] // base.block_m) * tiles_n,)](
        y, x, weight, bias, planes, b.bank, b.ranks, slot_scalings, row_order, segment_starts,
        *y.shape, x.shape[1], a.columns, a.max_rank, a.num_slots,
        *y.stride(), *x.stride(), *weight.stride(), *host.strides(bias), *b.strides, *b.rank_strides, tiles_n,
        **_widths(out_splits), **b.switches, HAS_BIAS=bias is not None, EVEN_K=x.shape[1] % base.block_k == 0,
        SPLIT=planes.shape[0], PRECISION=host.precision(x), LOW_PRECISION=low, UPCAST=host.upcast(x, a.one, b.one),
        GROUP_M=8, BLOCK_M=base.block_m, BLOCK_N=base.block_n, BLOCK_K=base.block_k,
        BLOCK_R=_block_rank(a.max_rank, low), BLOCK_SLOTS=_block_slots(a.num_slots),
        num_warps=base.num_warps, num_stages=base.num_stages,
    )  # fmt: skip


def _decode(y, x, weight, bias, a, b, slot_scalings, row_order, segment_starts, out_splits, tiles):
    base, shrink, finish = tiles.base, tiles.shrink, tiles.expand
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    planes = _planes(x, a, shrink.split)
    base_planes = torch.empty((base.split, num_rows, out_features), dtype=torch.float32, device=x.device)
    slot_tiles, blocks = _tiles_of_slots(num_rows, shrink.block_m, a.num_slots), -(-a.columns // shrink.block_n)
    num_shrink, tiles_n = slot_tiles * blocks * shrink.split, -(-out_features // base.block_n)
    switches = {"UPCAST": host.upcast(x, a.one, b.one), "BLOCK_SLOTS": _block_slots(a.num_slots)}
    triton_kernels.multi_decode_kernel[(num_shrink + base.split * tiles_n * -(-num_rows // base.block_m),)](
        base_planes, planes, x, weight, a.bank, a.ranks, row_order, segment_starts,
        num_rows, out_features, in_features, a.columns, a.max_rank, a.num_slots,
        *x.stride(), *weight.stride(), *a.strides, *a.rank_strides, num_shrink, blocks, tiles_n,
        **a.switches, EVEN_K=in_features % max(base.block_k, shrink.block_k) == 0, SPLIT=shrink.split,
        BASE_SPLIT=base.split, PRECISION=host.precision(x), LOW_PRECISION=host.precision(x, a.one), **switches,
        BLOCK_M=base.block_m, BLOCK_N=base.block_n, BLOCK_K=base.block_k,
        SHRINK_M=shrink.block_m, BLOCK_H=shrink.block_n, SHRINK_K=shrink.block_k,
        num_warps=base.num_warps, num_stages=base.num_stages,
    )  # fmt: skip
    low = host.precision(x, b.one)
    tiles_m = _tiles_of_slots(num_rows, finish.block_m, a.num_slots + 1)
    grid = (tiles_m, host.tiles_n(weight, out_splits, finish.block_n))
    triton_kernels.multi_finish_kernel[grid](
        y, base_planes, planes, bias, b.bank, b.ranks, slot_scalings, row_order, segment_starts,
        num_rows, out_features, a.columns, a.max_rank, a.num_slots, *y.stride(), *host.strides(bias),
        *b.strides, *b.rank_strides, **_widths(out_splits), **b.switches, HAS_BIAS=bias is not None,
        SPLIT=shrink.split, BASE_SPLIT=base.split, LOW_PRECISION=low, **switches,
        BLOCK_M=finish.block_m, BLOCK_N=finish.block_n, BLOCK_R=_block_rank(a.max_rank, low),
        num_warps=finish.num_warps, num_stages=finish.num_stages,
    )  # fmt: skip


def run(x, weight, bias, a, b, slot_scalings, row_order, segment_starts, out_splits, tiles):
    """y with the given :class:`~.config.Config`; a and b are :class:`Side`."""
    slot_scalings = slot_scalings.contiguous()
    if tiles.route == "vendor" and x.shape[0]:
        y = F.linear(x, weight, bias)
        planes = _planes(x, a, tiles.shrink.split)
        _shrink(planes, x, a, row_order, segment_starts, tiles.shrink)
        _expand(y, planes, b, slot_scalings, row_order, segment_starts, out_splits, tiles.expand, x)
        return y
    y = x.new_empty((x.shape[0], weight.shape[0]))
    if y.numel():
        launch = _decode if tiles.route == "decode" else _fused
        launch(y, x, weight, bias, a, b, slot_scalings, row_order, segment_starts, out_splits, tiles)
    return y


def multi_lora_linear(
    x, weight, bias, a_bank, b_bank, slot_scalings, slot_ranks, row_order, segment_starts, out_splits, batch_invariant
):
    with torch.no_grad():
        a = bank_a(a_bank, slot_ranks)
        b = bank_b(b_bank, slot_ranks, a.num_slices)
        tiles = _config("multi_lora_linear", x, weight, weight.shape[0], a, batch_invariant)
        return run(x, weight, bias, a, b, slot_scalings, row_order, segment_starts, out_splits, tiles)


def multi_lora_linear_list(
    x, weight, bias, lora_a, lora_b, slot_scalings, row_order, segment_starts, out_splits, batch_invariant
):
    with torch.no_grad():
        plan = (row_order, segment_starts, out_splits)
        if not lora_a:  # no slots: every row is base only
            none = x.new_empty((0, *([len(out_splits)] if out_splits else []), 1, x.shape[1]))
            bank = x.new_empty((0, weight.shape[0], 1))
            return multi_lora_linear(x, weight, bias, none, bank, slot_scalings, None, *plan, batch_invariant)
        if len(lora_a) > _MAX_LISTED:
            banks = _bank_of(lora_a, lora_b)
            return multi_lora_linear(x, weight, bias, *banks, slot_scalings, None, *plan, batch_invariant)
        a, b = listed(lora_a, lora_b, len(out_splits or (0,)))
        tiles = _config("multi_lora_linear", x, weight, weight.shape[0], a, batch_invariant)
        return run(x, weight, bias, a, b, slot_scalings, *plan, tiles)


def lora_shrink(x, a_bank, slot_ranks, row_order, segment_starts, batch_invariant):
    with torch.no_grad():
        a = bank_a(a_bank, slot_ranks)
        shape = (x.shape[0], *a_bank.shape[1:-1])
        if 0 in shape or a.num_slots == 0:
            return torch.zeros(shape, dtype=torch.float32, device=x.device)
        tiles = _config("lora_shrink", x, None, x.shape[1], a, batch_invariant)
        planes = _planes(x, a, tiles.split)
        _shrink(planes, x, a, row_order, segment_starts, tiles)
        h, (block_m, block_h) = torch.empty(shape, dtype=torch.float32, device=x.device), (16, 64)
        triton_kernels.sum_planes_kernel[(-(-x.shape[0] // block_m), -(-a.columns // block_h))](
            h, planes, row_order, segment_starts, x.shape[0], a.columns,
            SPLIT=tiles.split, BLOCK_M=block_m, BLOCK_H=block_h, num_warps=4,
        )  # fmt: skip
        return h


def lora_expand_(y, h, b_bank, slot_scalings, slot_ranks, row_order, segment_starts, out_splits, batch_invariant):
    with torch.no_grad():
        b = bank_b(b_bank, slot_ranks, len(out_splits or (0,)))
        tiles = _config("lora_expand_", y, None, y.shape[1], b, batch_invariant)
        planes, slot_scalings = h.contiguous().view(1, y.shape[0], b.columns), slot_scalings.contiguous()
        _expand(y, planes, b, slot_scalings, row_order, segment_starts, out_splits, tiles, y)


KERNELS = {
    "multi_lora_linear": multi_lora_linear,
    "multi_lora_linear_list": multi_lora_linear_list,
    "lora_shrink": lora_shrink,
    "lora_expand_": lora_expand_,
}


def STATIC_CASES():
    """Production sizes of every route, for the static gate."""
    from . import triton_cases

    return triton_cases.cases()
