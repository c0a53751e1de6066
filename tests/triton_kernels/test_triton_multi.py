"""The multi-adapter ops on Triton: every route against float64, odd shapes, isolation, bits."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import lora_kernels as lk
from lora_kernels.ops import lora_expand_, lora_linear, lora_shrink, multi_lora_linear, plan_batch
from lora_kernels.ops.multi import config
from lora_kernels.testing import (
    DTYPES,
    assert_within_budget,
    eager_multi_lora_linear,
    exact_multi_lora_linear,
    make_multi,
)

triton_multi = pytest.importorskip("lora_kernels.ops.multi.triton")

ROUTES = ("decode", "fused", "vendor")
TILES = config.Tiles(16, 32, 32, 4, 1, split=2)
SHRINK = config.Tiles(16, 16, 32, 4, 1, split=3)


def _config(route):
    return config.Config(route, TILES, SHRINK, config.Tiles(16, 32, 0, 4, 1))


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    """Runs the test once a route, whatever the size."""
    monkeypatch.setattr(config, "choose", lambda *args, **keywords: _config(request.param))
    return request.param


def _args(case):
    return case.x, case.weight, case.bias, case.a_bank, case.b_bank, case.slot_scalings


def run(case, slot_ranks="own", **keywords):
    ranks = case.slot_ranks if isinstance(slot_ranks, str) else slot_ranks
    plan = plan_batch(case.token_slots, ranks, num_slots=case.a_bank.shape[0])
    return multi_lora_linear(*_args(case), plan, **keywords)


def check(ours, case, out_splits=None):
    terms = (*_args(case), case.token_slots, case.slot_ranks, out_splits)
    assert_within_budget(ours, eager_multi_lora_linear(*terms), exact_multi_lora_linear(*terms))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_bank(dtypes, route, device):
    case = make_multi(21, 67, 41, 20, 5, *DTYPES[dtypes], device=device)
    check(run(case), case)
    case.weight.zero_()  # a big base hides a wrong update
    case.bias = None
    check(run(case), case)


@pytest.mark.parametrize(
    "shape",
    [(0, 8, 8, 2, 3), (1, 64, 48, 8, 4), (16, 96, 80, 1, 17), (23, 40, 24, 130, 2), (70, 33, 40, 3, 3)],
    ids=str,
)
def test_more_shapes(shape, device):
    case = make_multi(*shape, torch.float16, device=device)
    check(run(case), case)


def test_slices(route, device):
    """Slices of uneven width, one of them empty."""
    splits = [40, 0, 17, 7]
    case = make_multi(19, 48, 64, 6, 4, torch.float16, slices=4, device=device)
    check(run(case, out_splits=splits), case, splits)


def test_a_slice_of_rank_zero_is_not_targeted(route, device):
    case = make_multi(6, 16, 40, 4, 2, slices=2, device=device)
    case.token_slots.fill_(0)
    y = run(case, torch.tensor([[4, 0], [4, 4]]), out_splits=[24, 16])
    case.token_slots.fill_(-1)
    base = run(case, out_splits=[24, 16])
    assert torch.equal(y[:, 24:], base[:, 24:])
    assert not torch.equal(y[:, :24], base[:, :24])


@pytest.mark.parametrize("dtypes", ["f16", "bf16-f32"])
def test_lists(dtypes, route, device):
    case = make_multi(20, 40, 56, 12, 5, *DTYPES[dtypes], device=device)
    lists = _lists(case)
    plan = plan_batch(case.token_slots, num_slots=5)
    check(multi_lora_linear(case.x, case.weight, case.bias, *lists, case.slot_scalings, plan), case)


def _lists(case):
    ranks = case.slot_ranks.tolist()
    a = [case.a_bank[slot, ..., :rank, :] for slot, rank in enumerate(ranks)]
    return a, [case.b_bank[slot, :, :rank] for slot, rank in enumerate(ranks)]


def test_scalings_that_are_apart(route, device):
    case = make_multi(20, 40, 56, 12, 5, device=device)
    lists = [[factor.clone().requires_grad_() for factor in bank.unbind()] for bank in (case.a_bank, case.b_bank)]
    plan, h = plan_batch(case.token_slots, num_slots=5), torch.ones(20, 12, device=device)
    rest = (case.x, case.weight, case.bias)

    def results(scalings):
        y = multi_lora_linear(*rest, *lists, scalings, plan)
        found = [y, lora_expand_(torch.zeros_like(y).detach(), h, case.b_bank, scalings, plan)]
        found.append(multi_lora_linear(*rest, case.a_bank, case.b_bank, scalings, plan))
        return [*found, *torch.autograd.grad(y.sum(), [*lists[0], *lists[1]])]

    apart = torch.stack([case.slot_scalings, torch.full_like(case.slot_scalings, torch.nan)], 1)[:, 0]
    assert all(map(torch.equal, results(apart), results(case.slot_scalings)))


def test_lists_of_many_and_of_two_dtypes(monkeypatch, device):
    case = make_multi(20, 40, 56, 12, 5, torch.float16, device=device)
    lora_a, lora_b = _lists(case)
    args = (case.x, case.weight, case.bias)
    plan = plan_batch(case.token_slots, num_slots=5)
    lora_a[1] = lora_a[1].float()
    check(multi_lora_linear(*args, lora_a, lora_b, case.slot_scalings, plan), case)
    monkeypatch.setattr(triton_multi, "_MAX_LISTED", 4)
    check(multi_lora_linear(*args, lora_a, lora_b, case.slot_scalings, plan), case)


def test_lists_with_slices(route, device):
    splits = [24, 16]
    case = make_multi(20, 40, 40, 12, 3, torch.float16, slices=2, device=device)
    plan = plan_batch(case.token_slots, num_slots=3)
    y = multi_lora_linear(case.x, case.weight, case.bias, *_lists(case), case.slot_scalings, plan, out_splits=splits)
    check(y, case, splits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_base_rows_are_bitwise_the_base(dtype, route, device):
    case = make_multi(20, 64, 48, 8, 4, dtype, device=device)
    case.token_slots[::3] = -1
    if route == "fused" and device == "cpu":
        # A tensor core gives a row the same bits wherever it is in a block, numpy does not: keep rows in their places.
        order = torch.argsort(case.token_slots, stable=True)
        case = dataclasses.replace(case, x=case.x[order], token_slots=case.token_slots[order])
    y, slots = run(case), case.token_slots.clone()
    case.token_slots.fill_(-1)
    base = run(case)
    exact = F.linear(case.x.double(), case.weight.double(), case.bias.double())
    assert_within_budget(base, F.linear(case.x, case.weight, case.bias), exact)
    assert torch.equal(y[slots == -1], base[slots == -1])
    assert not torch.equal(y, base)


@pytest.mark.parametrize(
    ("poison", "dtype"), [(float("nan"), torch.float32), (float("inf"), torch.float16)], ids=["nan", "inf"]
)
@pytest.mark.parametrize("form", ["bank", "list"])
def test_adapters_are_isolated(poison, dtype, form, route, device):
    case = make_multi(20, 48, 40, 8, 4, dtype, device=device)
    case.slot_ranks.fill_(8)
    # Slot 1 shares tiles with base-only rows and with slots 0 and 2.
    case.token_slots.copy_(torch.tensor([1] * 10 + [-1, 0, 2, 2, 0, -1, 2, 0, 2, 2]))

    def call():
        if form == "bank":
            return run(case)
        plan = plan_batch(case.token_slots, num_slots=4)
        return multi_lora_linear(case.x, case.weight, case.bias, *_lists(case), case.slot_scalings, plan)

    clean = call()
    case.a_bank[1] = poison
    case.b_bank[1, :, ::2] = poison
    dirty = call()
    assert torch.equal(clean[10:], dirty[10:])
    assert not torch.isfinite(dirty[:10]).all()


def test_dead_ranks_are_never_read(route, device):
    case = make_multi(9, 32, 24, 8, 3, device=device)
    case.slot_ranks = torch.tensor([3, 8, 1], dtype=torch.int32, device=device)
    case.x[2] = torch.inf
    clean = run(case)
    case.a_bank[0, 3:] = case.a_bank[2, 1:] = float("nan")
    case.b_bank[0, :, 3:] = case.b_bank[2, :, 1:] = float("nan")
    assert torch.equal(clean.nan_to_num(), run(case).nan_to_num())
    assert torch.isfinite(clean[:2]).all()


def test_the_same_call_gives_the_same_bits(route, device):
    case = make_multi(20, 96, 64, 8, 4, device=device)
    assert torch.equal(run(case), run(case))


def test_batch_invariant(device):
    """Among themselves, and with ``lora_linear`` of the row's adapter alone.

    A tensor core gives a row the same bits wherever it is in a block, numpy does not: in the interpreter only rows
    that keep their places are compared.
    """
    case = make_multi(48, 96, 64, 8, 4, torch.float16, device=device)
    case.token_slots.copy_(torch.tensor([-1, 0, 1]).repeat_interleave(16))
    parts = [slice(0, 16), slice(16, 48), slice(32, 33)] + ([slice(5, 9), slice(30, 47)] if device == "cuda" else [])
    with lk.use_backend("triton", batch_invariant=True):
        whole = run(case)
        check(whole, case)
        for rows in parts:
            part = dataclasses.replace(case, x=case.x[rows], token_slots=case.token_slots[rows])
            assert torch.equal(run(part), whole[rows])
        for row in (16, 32):
            slot = int(case.token_slots[row])
            rank = int(case.slot_ranks[slot])
            adapter = (case.a_bank[slot, :rank], case.b_bank[slot, :, :rank], case.slot_scalings[slot])
            single = lora_linear(case.x[row : row + 1], case.weight, case.bias, *adapter)
            assert torch.equal(single[0], whole[row])


@pytest.mark.parametrize("slices", [None, 2])
@pytest.mark.parametrize("tokens", [11, 20])
def test_shrink_and_expand_are_the_two_halves(slices, tokens, device):
    splits = None if slices is None else [30, 18]
    case = make_multi(tokens, 32, 48, 6, 3, slices=slices, device=device)
    plan = plan_batch(case.token_slots, case.slot_ranks, num_slots=3)
    h = lora_shrink(case.x, case.a_bank, plan)
    assert h.dtype == torch.float32
    assert (h[case.token_slots == -1] == 0).all()
    for slot, rank in enumerate(case.slot_ranks.tolist()):
        assert (h[case.token_slots == slot][..., rank:] == 0).all()
    y = F.linear(case.x, case.weight, case.bias)
    base = y.clone()
    assert lora_expand_(y, h, case.b_bank, case.slot_scalings, plan, out_splits=splits) is y
    check(y, case, splits)
    assert torch.equal(y[case.token_slots == -1], base[case.token_slots == -1])
    frame = torch.full((tokens, 50), 3.0, device=device)
    frame[:, 1:49] = base
    lora_expand_(frame[:, 1:49], h, case.b_bank, case.slot_scalings, plan, out_splits=splits)
    assert torch.equal(frame[:, 1:49], y)
    assert (frame[:, 0] == 3).all()


def test_no_slots_and_no_rows(device):
    case = make_multi(5, 16, 24, 4, 1, device=device)
    case.token_slots.fill_(-1)
    empty = dataclasses.replace(
        case, a_bank=case.a_bank[:0], b_bank=case.b_bank[:0], slot_scalings=case.slot_scalings[:0]
    )
    y = run(empty, None)
    torch.testing.assert_close(y, F.linear(case.x, case.weight, case.bias))
    assert (lora_shrink(case.x, empty.a_bank, plan_batch(case.token_slots, num_slots=0)) == 0).all()
    plan = plan_batch(case.token_slots, num_slots=0)
    assert torch.equal(multi_lora_linear(case.x, case.weight, case.bias, [], [], empty.slot_scalings, plan), y)


def test_choice_is_pure_and_reaches_every_route():
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        sizes = [(m, 4096, 4096, 16, slots, 2, capability) for m in (1, 64, 200, 1000, 8192) for slots in (1, 8, 64)]
        chosen = [config.choose(*size) for size in sizes]
        assert chosen == [config.choose(*size) for size in sizes]
        assert {each.route for each in chosen} == set(ROUTES)
        invariant = {config.choose(m, 64, 64, 8, 3, 2, capability, batch_invariant=True) for m in (1, 64, 4000)}
        assert len(invariant) == 1
