"""The tensor-core kernels, their source run on the host: error budget at odd sizes, strides, several adapters, dX."""

import pytest
import torch
from emulated_cases import cuda, exact_multi, multi_case

from lora_kernels.ops import plan_batch
from lora_kernels.ops.linear.reference import KERNELS as LINEAR
from lora_kernels.ops.multi.reference import KERNELS as MULTI
from lora_kernels.testing import (
    assert_within_budget,
    eager_lora_linear,
    exact_lora_linear,
    make_linear,
)

pytestmark = pytest.mark.usefixtures("library")
F16, BF16 = torch.float16, torch.bfloat16
# M, K, N, R: one row; every tail odd; several tiles of each kind, aligned and not; a rank beyond a step; K in parts.
SHAPES = [(1, 1, 1, 1), (3, 70, 50, 5), (33, 64, 130, 16), (150, 96, 200, 33), (140, 40, 264, 8), (2, 1100, 40, 70)]


def _case(shape, dtype, seed=0):
    return make_linear(*shape, dtype, seed=seed)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape, dtype):
    case = _case(shape, dtype)
    for bias, invariant in ((case.bias, False), (None, False), (None, True)):
        args = (case.x, case.weight, bias, case.lora_a, case.lora_b, case.scaling)
        ours = cuda("lora_linear", *args, None, invariant)
        assert_within_budget(ours, eager_lora_linear(*args), exact_lora_linear(*args), f"{shape}")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [9, 150, 300])
def test_the_product_alone(library, rows, capability):
    """No rank at all, as the benchmark times it."""
    case = _case((rows, 200, 520, 8), BF16)
    none = case.lora_a[:0], case.lora_b[:, :0]
    library.lk_emulate_capability(capability)
    try:
        ours = cuda("lora_linear", case.x, case.weight, case.bias, *none, case.scaling, None, False)
    finally:
        library.lk_emulate_capability(80)
    x, weight, bias = case.x, case.weight, case.bias
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert_within_budget(ours, torch.nn.functional.linear(x, weight, bias), exact)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_update_alone(dtype):
    """A base of zeros hides no error of the update."""
    case = _case((70, 130, 72, 24), dtype)
    args = (case.x, torch.zeros_like(case.weight), None, case.lora_a, case.lora_b, case.scaling)
    ours = cuda("lora_linear", *args, None, False)
    assert_within_budget(ours, eager_lora_linear(*args), exact_lora_linear(*args))


def test_any_order_of_the_threads_gives_the_same_bits(library):
    case = _case((70, 200, 72, 24), BF16)
    found = []
    for seed, early in ((0, True), (0, False), (3, True), (9, False)):
        library.lk_emulate_settings(seed, early)
        found.append(cuda("lora_linear", *case.args(), None, False))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_rows_have_the_same_bits_in_any_batch():
    """The tile does not matter to a sum; with batch_invariant nor does the number of rows."""
    case = _case((150, 1100, 200, 20), BF16)
    whole = cuda("lora_linear", *case.args(), None, True)
    for rows in (slice(0, 1), slice(7, 40), slice(20, 150)):
        part = cuda("lora_linear", case.x[rows], *case.args()[1:], None, True)
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("shape", [(20, 1100, 40, 8), (80, 48, 40, 8)], ids=["few rows", "many"])
def test_strides_and_out(shape):
    case = _case(shape, BF16)
    expected = cuda("lora_linear", *case.args(), None, False)
    apart = lambda t: t.t().contiguous().t()  # noqa: E731
    odd = lambda t: torch.cat([t, torch.full_like(t, torch.nan)[:, :3]], 1)[:, : t.shape[1]]  # noqa: E731
    for turn in (apart, odd):
        args = (turn(case.x), turn(case.weight), case.bias, turn(case.lora_a), turn(case.lora_b), case.scaling)
        assert torch.equal(cuda("lora_linear", *args, None, False), expected)
    room = torch.full((shape[0], 90), torch.nan, dtype=BF16)
    cuda("lora_linear_out", room[:, 3:83:2], *case.args(), None, False)
    assert torch.equal(room[:, 3:83:2], expected)
    room[:, 3:83:2] = torch.nan
    assert room.isnan().all()


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("shape", [(1, 40, 33, 3), (70, 130, 136, 16)], ids=str)
def test_add(shape, dtype):
    case = _case(shape, dtype)
    y = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, eager = y.clone(), y.clone()
    terms = (case.x, case.lora_a, case.lora_b, case.scaling, False)
    cuda("lora_add_", ours, *terms)
    LINEAR["lora_add_"](eager, *terms)
    exact = y.double() + case.scaling.double() * (case.x.double() @ case.lora_a.double().t() @ case.lora_b.double().t())
    assert_within_budget(ours, eager, exact)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_x(shape, dtype):
    case = _case(shape, dtype)
    dy = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    for weight in (case.weight, None):
        args = (dy, case.x, weight, case.lora_a, case.lora_b, case.scaling)
        rest = (torch.empty(0), torch.empty(0, dtype=torch.uint8), 0.0, None, True, False, False, False)
        ours, da, db = cuda("lora_linear_backward", *args, *rest)
        exact = case.scaling.double() * (dy.double() @ case.lora_b.double() @ case.lora_a.double())
        eager = (dy @ case.lora_b @ case.lora_a) * case.scaling.to(dtype)
        if weight is not None:
            exact, eager = exact + dy.double() @ weight.double(), eager + dy @ weight
        assert_within_budget(ours, eager, exact, f"{shape}")
        assert da.numel() == db.numel() == 0


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(("shape", "slots"), [((1, 40, 30, 4), 1), ((90, 72, 100, 16), 5), ((150, 56, 136, 35), 40)])
def test_several_adapters(shape, slots, dtype):
    case, plan = multi_case(shape, slots, dtype)
    args = (case.x, case.weight, case.bias, case.a_bank, case.b_bank, case.slot_scalings, *plan, None, False)
    ours, eager = cuda("multi_lora_linear", *args), MULTI["multi_lora_linear"](*args)
    assert_within_budget(ours, eager, exact_multi(case))


def test_what_is_not_finite_in_an_adapter_stays_in_its_rows():
    case, plan = multi_case((90, 72, 100, 16), 5, BF16)
    args = (case.x, case.weight, case.bias, case.a_bank, case.b_bank, case.slot_scalings, *plan, None, False)
    clean = cuda("multi_lora_linear", *args)
    for bank in (case.a_bank, case.b_bank):
        kept = bank[2].clone()
        for value in (torch.inf, torch.nan):
            bank[2] = value
            ours = cuda("multi_lora_linear", *args)
            others = case.token_slots != 2
            assert torch.equal(ours[others], clean[others])
            assert not ours[~others].isfinite().any()
        bank[2] = kept


def test_unused_ranks_are_not_read():
    case, plan = multi_case((40, 48, 64, 20), 4, F16)
    args = (case.x, case.weight, case.bias, case.a_bank, case.b_bank, case.slot_scalings, *plan, None, False)
    clean = cuda("multi_lora_linear", *args)
    for slot, rank in enumerate(case.slot_ranks.tolist()):
        case.a_bank[slot, rank:] = torch.nan
        case.b_bank[slot, :, rank:] = torch.nan
    assert torch.equal(cuda("multi_lora_linear", *args), clean)


def test_rows_of_the_base_alone_are_those_of_no_adapter():
    case, plan = multi_case((90, 200, 100, 16), 5, BF16)
    base = case.token_slots == -1
    assert base.any()
    args = (case.x, case.weight, case.bias, case.a_bank, case.b_bank, case.slot_scalings, *plan, None, False)
    ours = cuda("multi_lora_linear", *args)
    none = torch.zeros_like(case.a_bank[0]), torch.zeros_like(case.b_bank[0]), torch.zeros(())
    alone = cuda("lora_linear", case.x, case.weight, case.bias, *none, None, False)
    assert torch.equal(ours[base], alone[base])


def test_a_plan_with_room_to_spare_and_empty_batches():
    case, _ = multi_case((30, 40, 30, 4), 3, BF16)
    room = plan_batch(case.token_slots, case.slot_ranks, num_slots=3)
    exact_size = (room.slot_ranks, room.row_order, room.segment_starts)
    from lora_kernels.ops import BatchPlan

    plan = plan_batch(case.token_slots, case.slot_ranks, out=BatchPlan.empty(100, 3, 4))
    banks = (case.a_bank, case.b_bank, case.slot_scalings)
    run = lambda x, *plan: cuda("multi_lora_linear", x, case.weight, case.bias, *banks, *plan, None, False)  # noqa: E731
    roomy = run(case.x, plan.slot_ranks, plan.row_order, plan.segment_starts)
    assert torch.equal(roomy, run(case.x, *exact_size))
    assert run(case.x[:0], *exact_size).shape == (0, 30)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_shrink_and_expand(dtype):
    case, plan = multi_case((70, 96, 72, 20), 4, dtype)
    ours = cuda("lora_shrink", case.x, case.a_bank, *plan, False)
    theirs = MULTI["lora_shrink"](case.x, case.a_bank, *plan, False)
    exact = torch.zeros_like(ours).double()
    for row, slot in enumerate(case.token_slots.tolist()):
        if slot >= 0:
            rank = case.slot_ranks[slot]
            exact[row, :rank] = case.x[row].double() @ case.a_bank[slot, :rank].double().t()
    assert_within_budget(ours, theirs, exact)
    assert torch.equal(ours == 0, exact == 0)
    y = -torch.zeros(70, 72, dtype=dtype)
    mine = y.clone()
    cuda("lora_expand_", mine, ours, case.b_bank, case.slot_scalings, *plan, None, False)
    eager = y.clone()
    rounded = ours.to(dtype).float()
    MULTI["lora_expand_"](eager, rounded, case.b_bank, case.slot_scalings, *plan, None, False)
    assert_within_budget(mine, eager, exact_multi(case, low_rank_only=True))
    assert mine[case.token_slots == -1].signbit().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(0, a[0].float()), "float16 or bfloat16"),
        (lambda a: a.__setitem__(3, a[3].float()), "lora_a: expected the dtype"),
        (lambda a: a.__setitem__(4, a[4][1:]), "lora_b: expected"),
        (lambda a: a.__setitem__(6, [8, 8]), "out_splits"),
    ],
)
def test_refusals_name_the_argument(change, message):
    args = [*_case((4, 24, 16, 4), BF16).args(), None, False]
    change(args)
    with pytest.raises(RuntimeError, match=message):
        cuda("lora_linear", *args)
