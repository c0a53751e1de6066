"""The kernel for few rows, its source run on the host: error budget, parts of a sum, several adapters, its choice."""

from ctypes import c_int64

import pytest
import torch
from emulated_cases import cuda, exact_multi, multi_case

from lora_kernels.ops import BatchPlan, plan_batch
from lora_kernels.ops.multi.reference import KERNELS as MULTI
from lora_kernels.testing import assert_within_budget, eager_lora_linear, exact_lora_linear, make_linear

pytestmark = pytest.mark.usefixtures("library")
F16, BF16 = torch.float16, torch.bfloat16
SMS = 4  # of the emulated device
# M, K, N, R: a token; 16, 32 and 64 at a time, full and not; a sum in one part and in several; odd sizes and ranks.
SHAPES = [
    (1, 40, 33, 3),
    (1, 2048, 72, 16),
    (8, 1100, 50, 5),
    (16, 64, 130, 40),
    (17, 1031, 64, 16),
    (32, 96, 72, 1),
    (33, 1600, 40, 8),
    (64, 72, 136, 70),
]


def _parts(library, m, n, k, sms=SMS, invariant=False):
    return library.lk_decode_parts(c_int64(m), c_int64(n), c_int64(k), sms, invariant)


def _multi_args(case, plan):
    banks = (case.a_bank, case.b_bank, case.slot_scalings)
    return (case.x, case.weight, case.bias, *banks, *plan, None, False)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(library, shape, dtype):
    m, k, n, _ = shape
    assert _parts(library, m, n, k) == max(1, k // 512)
    case = make_linear(*shape, dtype)
    nothing = torch.zeros_like(case.weight)
    for weight, bias in ((case.weight, case.bias), (case.weight, None), (nothing, None)):
        args = (case.x, weight, bias, case.lora_a, case.lora_b, case.scaling)
        ours = cuda("lora_linear", *args, None, False)
        assert_within_budget(ours, eager_lora_linear(*args), exact_lora_linear(*args), f"{shape}")


@pytest.mark.parametrize("slots", [None, 3])
def test_any_order_of_threads_and_blocks_gives_the_same_bits(set_order, slots):
    """Whichever block of a tile is the last to arrive, the parts are added in their own order."""
    if slots is None:
        name, args = "lora_linear", [*make_linear(20, 2100, 100, 24, BF16).args(), None, False]
    else:
        name, args = "multi_lora_linear", _multi_args(*multi_case((20, 2100, 100, 24), slots, BF16))
    found = []
    for seed, early in ((0, True), (0, False), (3, True), (9, False), (10, False)):
        set_order(seed, early)
        found.append(cuda(name, *args))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_row_has_the_same_bits_among_up_to_64():
    case = make_linear(64, 1100, 70, 20, BF16)
    whole = cuda("lora_linear", *case.args(), None, False)
    for rows in (slice(0, 1), slice(7, 25), slice(20, 60)):
        assert torch.equal(cuda("lora_linear", case.x[rows], *case.args()[1:], None, False), whole[rows])


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(
    ("shape", "slots"), [((1, 40, 30, 4), 1), ((13, 1100, 100, 16), 5), ((30, 2060, 40, 35), 4), ((64, 56, 72, 8), 70)]
)
def test_several_adapters(shape, slots, dtype):
    case, plan = multi_case(shape, slots, dtype)
    args = _multi_args(case, plan)
    assert_within_budget(cuda("multi_lora_linear", *args), MULTI["multi_lora_linear"](*args), exact_multi(case))
    case.weight.zero_()
    case.bias = None
    args = _multi_args(case, plan)
    exact = exact_multi(case, low_rank_only=True)
    assert_within_budget(cuda("multi_lora_linear", *args), MULTI["multi_lora_linear"](*args), exact)


def test_what_is_not_finite_in_an_adapter_stays_in_its_rows():
    case, plan = multi_case((40, 1100, 72, 16), 5, BF16)
    clean = cuda("multi_lora_linear", *_multi_args(case, plan))
    others = case.token_slots != 2
    assert not others.all()
    for bank in (case.a_bank, case.b_bank):
        kept = bank[2].clone()
        bank[2] = torch.nan
        ours = cuda("multi_lora_linear", *_multi_args(case, plan))
        assert torch.equal(ours[others], clean[others])
        assert not ours[~others].isfinite().any()
        bank[2] = kept


def test_unused_ranks_are_not_read():
    case, plan = multi_case((20, 48, 64, 40), 4, F16)
    clean = cuda("multi_lora_linear", *_multi_args(case, plan))
    for slot, rank in enumerate(case.slot_ranks.tolist()):
        case.a_bank[slot, rank:] = torch.nan
        case.b_bank[slot, :, rank:] = torch.nan
    assert torch.equal(cuda("multi_lora_linear", *_multi_args(case, plan)), clean)


def test_rows_of_the_base_alone_are_those_of_no_adapter():
    case, plan = multi_case((50, 1100, 100, 16), 5, BF16)
    base = case.token_slots == -1
    assert base.any()
    ours = cuda("multi_lora_linear", *_multi_args(case, plan))
    none = torch.zeros_like(case.a_bank[0]), torch.zeros_like(case.b_bank[0]), torch.zeros(())
    alone = cuda("lora_linear", case.x, case.weight, case.bias, *none, None, False)
    assert torch.equal(ours[base], alone[base])
    empty = plan_batch(torch.full_like(case.token_slots, -1), num_slots=0)
    banks = (case.a_bank[:0], case.b_bank[:0], case.slot_scalings[:0])
    rows = (None, empty.row_order, empty.segment_starts)
    without = cuda("multi_lora_linear", case.x, case.weight, case.bias, *banks, *rows, None, False)
    assert torch.equal(without[base], ours[base])


def test_a_bank_of_rank_0_leaves_the_base():
    case, plan = multi_case((30, 1100, 72, 16), 5, BF16)
    none = (case.a_bank[:, :0], case.b_bank[:, :, :0], case.slot_scalings, torch.zeros_like(case.slot_ranks))
    found = cuda("multi_lora_linear", case.x, case.weight, case.bias, *none, *plan[1:], None, False)
    alone = (case.a_bank[0, :0], case.b_bank[0, :, :0], torch.zeros(()))
    assert torch.equal(found, cuda("lora_linear", case.x, case.weight, case.bias, *alone, None, False))


def test_the_slot_of_an_adapter_does_not_matter():
    case, plan = multi_case((30, 1600, 72, 16), 5, BF16)
    expected = cuda("multi_lora_linear", *_multi_args(case, plan))
    order = torch.tensor([3, 0, 4, 2, 1])  # the adapter now in each slot
    banks = (case.a_bank[order], case.b_bank[order], case.slot_scalings[order])
    slots = torch.where(case.token_slots < 0, -1, order.argsort()[case.token_slots.long()]).int()
    moved = plan_batch(slots, case.slot_ranks[order], num_slots=5)
    rows = (moved.slot_ranks, moved.row_order, moved.segment_starts)
    found = cuda("multi_lora_linear", case.x, case.weight, case.bias, *banks, *rows, None, False)
    assert torch.equal(found, expected)


def test_a_plan_with_room_to_spare():
    case, plan = multi_case((30, 1100, 30, 4), 3, BF16)
    roomy = plan_batch(case.token_slots, case.slot_ranks, out=BatchPlan.empty(100, 3, 4))
    rows = (roomy.slot_ranks, roomy.row_order, roomy.segment_starts)
    found = cuda("multi_lora_linear", *_multi_args(case, rows))
    assert torch.equal(found, cuda("multi_lora_linear", *_multi_args(case, plan)))


def test_which_calls_it_takes(library):
    assert _parts(library, 0, 4096, 4096, 132) == _parts(library, 65, 4096, 4096, 132) == 0
    assert _parts(library, 4, 4096, 0, 132) == _parts(library, 4, 0, 4096, 132) == 0
    for m in (1, 64, 8192):
        assert _parts(library, m, 4096, 4096, 132, invariant=True) == 0


@pytest.mark.parametrize("sms", [84, 108, 132, 148])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (40, 300)])
def test_the_weight_is_dealt_out_evenly(library, n, k, sms):
    parts = _parts(library, 1, n, k, sms)
    assert {_parts(library, m, n, k, sms) for m in (1, 8, 33, 64)} == {parts}
    assert parts == 1 or k // parts >= 512
    blocks = -(-n // 64) * parts
    busiest = -(-blocks // sms) * sms / blocks
    # What no cut of no less than 512 improves on by more than what parts cost.
    best = min(-(-(-(-n // 64) * p) // sms) * sms / (-(-n // 64) * p) for p in range(1, min(8, max(1, k // 512)) + 1))
    assert busiest <= best * 1.25
