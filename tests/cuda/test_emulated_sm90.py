"""The kernel of sm_90a, its source run on the host with its barriers, tensor copies and warpgroup products: the error
budget forward, for dX and with several adapters, tails, bits, and what it leaves to the other kernels."""

import ctypes

import pytest
import torch
from emulated_cases import cuda, exact_multi, multi_case

from lora_kernels.ops import BatchPlan, plan_batch
from lora_kernels.ops.multi.reference import KERNELS as MULTI
from lora_kernels.testing import assert_within_budget, eager_lora_linear, exact_lora_linear, make_linear

F16, BF16 = torch.float16, torch.bfloat16
SMS = 4  # of the emulated device
# M, K, N, R and the columns of the tile: tails of every size; a ring gone round; ranks of several steps, and none that
# a copy can address; tiles that a block takes one after the other.
SHAPES = {
    (130, 200, 200, 16): 128,
    (65, 8, 264, 1): 128,
    (200, 456, 136, 70): 128,
    (256, 72, 512, 40): 256,
    (140, 328, 504, 130): 256,
    (520, 136, 520, 8): 256,
}
LATE_PRODUCTS, LATE_COPIES = (3, True), (5, False)


@pytest.fixture(autouse=True)
def _hopper(library):
    library.lk_emulate_capability(90)
    library.lk_emulate_settings(*LATE_PRODUCTS)
    yield
    library.lk_emulate_capability(80)


@pytest.fixture
def runs(library):
    """How often the kernel has run since the test began."""
    before = library.lk_emulate_sm90_launches()
    return lambda: library.lk_emulate_sm90_launches() - before


def _cols(library, m, k, n, r, sms=SMS):
    return library.lk_sm90_cols(*map(ctypes.c_int64, (m, n, k, r)), sms)


@pytest.mark.parametrize("schedule", [LATE_PRODUCTS, LATE_COPIES], ids=["late products", "late copies"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(library, runs, shape, schedule):
    assert _cols(library, *shape) == SHAPES[shape]
    library.lk_emulate_settings(*schedule)
    case = make_linear(*shape, BF16 if schedule == LATE_PRODUCTS else F16)
    for weight, bias in ((case.weight, case.bias), (torch.zeros_like(case.weight), None)):
        args = (case.x, weight, bias, case.lora_a, case.lora_b, case.scaling)
        ours = cuda("lora_linear", *args, None, False)
        assert_within_budget(ours, eager_lora_linear(*args), exact_lora_linear(*args), f"{shape}")
    assert runs() == 2


@pytest.mark.parametrize("schedule", [LATE_PRODUCTS, LATE_COPIES], ids=["late products", "late copies"])
@pytest.mark.parametrize("shape", [(130, 200, 200, 16), (140, 328, 504, 77), (256, 512, 72, 8)], ids=str)
def test_gradient_of_x(library, runs, shape, schedule):
    library.lk_emulate_settings(*schedule)
    dtype = F16 if schedule == LATE_PRODUCTS else BF16
    case = make_linear(*shape, dtype)
    dy = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    for weight in (case.weight, torch.zeros_like(case.weight)):
        args = (dy, case.x, weight, case.lora_a, case.lora_b, case.scaling)
        rest = (torch.empty(0), torch.empty(0, dtype=torch.uint8), 0.0, None, True, False, False, False)
        ours, *_ = cuda("lora_linear_backward", *args, *rest)
        low = dy.double() @ case.lora_b.double() @ case.lora_a.double()
        eager = dy @ weight + (dy @ case.lora_b @ case.lora_a) * case.scaling.to(dtype)
        assert_within_budget(ours, eager, dy.double() @ weight.double() + case.scaling.double() * low, f"{shape}")
    assert runs() == 2


def test_the_forward_pass_of_training(runs):
    case = make_linear(130, 200, 200, 16, BF16)
    y, h, _ = cuda("lora_linear_train", *case.args(), 0.0, None, None, False)
    assert torch.equal(y, cuda("lora_linear", *case.args(), None, False))
    assert_within_budget(h, (case.x @ case.lora_a.t()).float(), case.x.double() @ case.lora_a.double().t())
    assert runs() == 2


def _multi_args(case, plan):
    banks = (case.a_bank, case.b_bank, case.slot_scalings)
    return (case.x, case.weight, case.bias, *banks, *plan, None, False)


def _in_segments(case, slots):
    """The case with rows of a slot side by side, so that whole tiles are of one."""
    case.token_slots = torch.arange(len(case.token_slots)) // 130 % (slots + 1) - 1
    plan = plan_batch(case.token_slots, case.slot_ranks, num_slots=slots)
    return case, (plan.slot_ranks, plan.row_order, plan.segment_starts)


@pytest.mark.parametrize("schedule", [LATE_PRODUCTS, LATE_COPIES], ids=["late products", "late copies"])
@pytest.mark.parametrize(
    ("shape", "slots", "segments"),
    [((150, 72, 136, 16), 3, False), ((130, 64, 200, 35), 5, False), ((530, 72, 136, 16), 2, True)],
    ids=["mixed", "odd ranks", "segments"],
)
def test_several_adapters(library, runs, shape, slots, segments, schedule):
    library.lk_emulate_settings(*schedule)
    case, plan = multi_case(shape, slots, BF16)
    if segments:
        case, plan = _in_segments(case, slots)
    args = _multi_args(case, plan)
    ours = cuda("multi_lora_linear", *args)
    assert_within_budget(ours, MULTI["multi_lora_linear"](*args), exact_multi(case))
    assert runs() == 1
    # Rows of the base alone: those of a call with no adapter, and with any.
    base = case.token_slots == -1
    assert base.any()
    of_zeros = torch.zeros_like(case.a_bank[0]), torch.zeros_like(case.b_bank[0])
    for adapter in ((of_zeros[0][:0], of_zeros[1][:, :0]), of_zeros):
        alone = cuda("lora_linear", case.x, case.weight, case.bias, *adapter, torch.zeros(()), None, False)
        assert torch.equal(ours[base], alone[base])
    assert runs() == 3


def test_what_is_not_finite_in_an_adapter_stays_in_its_rows(runs):
    case, plan = multi_case((150, 72, 136, 16), 3, BF16)
    clean = cuda("multi_lora_linear", *_multi_args(case, plan))
    for bank, value in ((case.a_bank, torch.nan), (case.b_bank, torch.inf)):
        kept = bank[2].clone()
        bank[2] = value
        ours = cuda("multi_lora_linear", *_multi_args(case, plan))
        others = case.token_slots != 2
        assert torch.equal(ours[others], clean[others])
        assert not ours[~others].isfinite().any()
        bank[2] = kept
    assert runs() == 3


def test_unused_ranks_are_not_read(runs):
    case, plan = multi_case((140, 64, 136, 40), 4, F16)
    clean = cuda("multi_lora_linear", *_multi_args(case, plan))
    for slot, rank in enumerate(case.slot_ranks.tolist()):
        case.a_bank[slot, rank:] = torch.nan
        case.b_bank[slot, :, rank:] = torch.nan
    assert torch.equal(cuda("multi_lora_linear", *_multi_args(case, plan)), clean)
    assert runs() == 2


def test_a_plan_with_room_to_spare_and_slots_without_rows(runs):
    case, _ = multi_case((140, 64, 136, 8), 6, BF16)
    case.token_slots[case.token_slots == 0] = -1

    def run(**options):
        plan = plan_batch(case.token_slots, case.slot_ranks, **options)
        return cuda("multi_lora_linear", *_multi_args(case, (plan.slot_ranks, plan.row_order, plan.segment_starts)))

    assert torch.equal(run(num_slots=6), run(out=BatchPlan.empty(200, 6, 8)))
    case.token_slots[:] = -1
    alone = run(num_slots=6)
    assert_within_budget(alone, torch.nn.functional.linear(case.x, case.weight, case.bias), exact_multi(case))
    assert runs() == 3


def test_banks_of_any_strides(runs):
    case, plan = multi_case((140, 64, 136, 16), 3, BF16)
    expected = cuda("multi_lora_linear", *_multi_args(case, plan))
    wide = torch.full((3, 140, 24), torch.nan, dtype=BF16)
    turned = case.b_bank.transpose(1, 2).contiguous().transpose(1, 2)
    by_rank = case.b_bank.transpose(0, 1).contiguous().transpose(0, 1)  # a slot's rows are not one after the other
    wide[:, :136, :16] = case.b_bank
    for bank in (wide[:, :136, :16], turned, by_rank):
        case.b_bank = bank
        assert torch.equal(cuda("multi_lora_linear", *_multi_args(case, plan)), expected)
    assert runs() == 4


def test_a_bank_whose_columns_are_one(runs):
    case, plan = multi_case((140, 64, 136, 16), 3, BF16)
    case.b_bank = case.b_bank[:, :1].expand(3, 136, 16)
    ours = cuda("multi_lora_linear", *_multi_args(case, plan))
    case.b_bank = case.b_bank.contiguous()
    assert torch.equal(ours, cuda("multi_lora_linear", *_multi_args(case, plan)))
    assert runs() == 2


def test_rows_that_lie_in_one_another_run_on_the_other_kernels(runs):
    """A map of the driver has rows that are as far apart as they are long, or further."""
    case = make_linear(130, 64, 136, 16, BF16)
    args = [torch.cat([case.x.view(-1), case.x[0]]).unfold(0, 64, 8)[:130], *case.args()[1:], None, False]
    ours = cuda("lora_linear", *args)
    assert runs() == 0
    assert_within_budget(ours, eager_lora_linear(*args[:6]), exact_lora_linear(*args[:6]))


def test_any_order_of_the_threads_gives_the_same_bits(library, runs):
    case, multi = make_linear(150, 200, 136, 24, BF16), multi_case((150, 64, 136, 16), 4, BF16)
    found = []
    for seed, early in ((0, True), (0, False), (4, True), (9, False)):
        library.lk_emulate_settings(seed, early)
        found.append((cuda("lora_linear", *case.args(), None, False), cuda("multi_lora_linear", *_multi_args(*multi))))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert runs() == 8


@pytest.mark.parametrize("name", ["x", "weight", "y", "n"])
def test_what_the_copies_can_not_address_runs_on_the_other_kernels(runs, name):
    n = 132 if name == "n" else 136
    case = make_linear(130, 200, n, 16, BF16)
    odd = lambda t: torch.cat([t, torch.full_like(t, torch.nan)[:, :4]], 1)[:, : t.shape[1]]  # noqa: E731
    args = [*case.args(), None, False]
    if name in ("x", "weight"):
        args[name == "weight"] = odd(args[name == "weight"])
    out = torch.empty(130, n, dtype=BF16)
    cuda("lora_linear_out", odd(out) if name == "y" else out, *args)
    assert runs() == 0
    cuda("lora_linear", *make_linear(130, 200, 136, 16, BF16).args(), None, True)
    assert runs() == 0  # with batch_invariant the kernel must not depend on the rows
    cuda("lora_linear", *make_linear(130, 200, 136, 13, BF16).args(), None, False)
    assert runs() == 1


def test_a_layer_without_outputs(runs):
    none = torch.empty(130, 8, dtype=BF16)[:, :0]
    cuda("lora_linear_out", none, *make_linear(130, 72, 0, 16, BF16).args(), None, False)
    assert runs() == 0


def test_other_devices_do_not_run_it(library, runs):
    for capability in (80, 86, 89, 100, 120):
        library.lk_emulate_capability(capability)
        cuda("lora_linear", *make_linear(130, 72, 136, 16, BF16).args(), None, False)
    assert runs() == 0


def test_its_choice(library):
    cols = lambda *shape: _cols(library, *shape, sms=132)  # noqa: E731
    assert cols(8192, 4096, 4096, 16) == 256
    assert cols(2048, 4096, 4096, 16) == 256  # 256 tiles are 1.94 waves
    assert cols(1024, 4096, 4096, 16) == 256
    assert cols(512, 4096, 4096, 16) == 128  # of 128 columns all run at once, one on each
    assert cols(128, 4096, 4096, 16) == 0  # 32 of these tiles would leave a hundred idle
    assert cols(100, 64, 64, 16) == 0


@pytest.mark.parametrize("forget", ["fence", "full", "empty", "products", "arrival"])
def test_the_emulator_finds_what_is_forgotten(library, forget):
    library.lk_emulate_faulty_sm90.restype = ctypes.c_char_p
    forgettable = ["nothing", "fence", "full", "empty", "products", "arrival"]
    schedules = ((0, True), (0, False), (1, True), (1, False))

    def found(what):
        for schedule in schedules:
            library.lk_emulate_settings(*schedule)
            yield library.lk_emulate_faulty_sm90(forgettable.index(what))

    assert set(found("nothing")) == {b""}
    assert any(found(forget))
