"""multi_lora_linear, lora_shrink, lora_expand_ and plan_batch: one adapter a row."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_kernels as lk
from lora_kernels.ops import (
    BatchPlan,
    lora_expand_,
    lora_linear,
    lora_shrink,
    multi_lora_linear,
    plan_batch,
)
from lora_kernels.testing import assert_within_budget, eager_multi_lora_linear, exact_multi_lora_linear, make_multi

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="f32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float16, id="f16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-f32"),
]


def run(case, slices=None, **kwargs):
    plan = plan_batch(case.token_slots, case.slot_ranks)
    return multi_lora_linear(
        case.x, case.weight, case.bias, case.a_bank, case.b_bank, case.slot_scalings, plan, **kwargs
    )


def _terms(case):
    banks = (case.a_bank, case.b_bank, case.slot_scalings)
    return case.x, case.weight, case.bias, *banks, case.token_slots, case.slot_ranks


def eager(case, out_splits=None):
    return eager_multi_lora_linear(*_terms(case), out_splits)


def exact(case, out_splits=None):
    return exact_multi_lora_linear(*_terms(case), out_splits)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(0, 8, 8, 2, 3), (1, 64, 48, 8, 4), (16, 96, 80, 16, 17), (75, 130, 67, 33, 5), (450, 130, 67, 33, 2)],
    ids=str,
)
def test_bank(backend, dtype, adapter_dtype, shape):
    case = make_multi(*shape, dtype, adapter_dtype)
    assert_within_budget(run(case), eager(case), exact(case))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 30),
    st.integers(1, 50),
    st.integers(1, 50),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(num_tokens, in_features, out_features, max_rank, num_slots, dtype):
    case = make_multi(num_tokens, in_features, out_features, max_rank, num_slots, dtype, seed=num_tokens)
    parts = {name: getattr(case, name).abs() for name in ("x", "weight", "bias", "a_bank", "b_bank")}
    magnitude = exact(dataclasses.replace(case, **parts))
    assert_within_budget(run(case), eager(case), exact(case), magnitude=magnitude)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices(backend, dtype):
    splits = [40, 8, 16]
    case = make_multi(13, 48, 64, 6, 4, dtype, slices=3)
    assert_within_budget(run(case, out_splits=splits), eager(case, splits), exact(case, splits))


def test_slice_of_rank_zero_is_not_targeted(backend):
    splits = [8, 8]
    case = make_multi(6, 16, 16, 4, 2, slices=2)
    case.token_slots = torch.zeros(6, dtype=torch.int32)
    plan = plan_batch(case.token_slots, torch.tensor([[4, 0], [4, 4]]))
    args = (case.x, case.weight, case.bias, case.a_bank, case.b_bank, case.slot_scalings)
    y = multi_lora_linear(*args, plan, out_splits=splits)
    base = multi_lora_linear(*args, plan_batch([-1] * 6, num_slots=2), out_splits=splits)
    assert torch.equal(y[:, 8:], base[:, 8:])
    assert not torch.equal(y[:, :8], base[:, :8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [5, 64, 600])
def test_lists_of_adapters(backend, dtype, num_tokens):
    case = make_multi(num_tokens, 40, 56, 12, 4, dtype)
    ranks = case.slot_ranks.tolist()
    lora_a = [case.a_bank[slot, :rank].clone() for slot, rank in enumerate(ranks)]
    lora_b = [case.b_bank[slot, :, :rank].clone() for slot, rank in enumerate(ranks)]
    y = multi_lora_linear(
        case.x, case.weight, case.bias, lora_a, lora_b, case.slot_scalings, plan_batch(case.token_slots, num_slots=4)
    )
    assert_within_budget(y, eager(case), exact(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [4, 48])
def test_base_rows_are_bitwise_the_base(backend, dtype, num_tokens):
    case = make_multi(num_tokens, 64, 48, 8, 4, dtype)
    case.token_slots[::3] = -1
    y = run(case)
    slots = case.token_slots.clone()
    case.token_slots.fill_(-1)
    base = run(case)
    assert torch.equal(y[slots == -1], base[slots == -1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [6, 40, 600])
def test_adapters_are_isolated(backend, dtype, poison, num_tokens):
    case = make_multi(num_tokens, 64, 48, 8, 4, dtype)
    case.token_slots[: num_tokens // 2] = 1
    case.token_slots[num_tokens // 2 :] = torch.arange(num_tokens - num_tokens // 2) % 2 * 2
    clean = run(case)
    case.a_bank[1] = poison
    case.b_bank[1, :, ::2] = poison
    dirty = run(case)
    assert torch.equal(clean[num_tokens // 2 :], dirty[num_tokens // 2 :])
    assert not torch.isfinite(dirty[: num_tokens // 2]).all()


def test_dead_ranks_are_never_read(backend):
    case = make_multi(9, 32, 24, 8, 3)
    case.slot_ranks = torch.tensor([3, 8, 1], dtype=torch.int32)
    clean = run(case)
    case.a_bank[0, 3:] = case.a_bank[2, 1:] = float("nan")
    case.b_bank[0, :, 3:] = case.b_bank[2, :, 1:] = float("nan")
    assert torch.equal(clean, run(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant(backend, dtype):
    case = make_multi(33, 96, 64, 8, 4, dtype)
    with lk.use_backend(backend, batch_invariant=True):
        y = run(case)
        for row in (0, 7, 32):
            alone = multi_lora_linear(
                case.x[row : row + 1], case.weight, case.bias, case.a_bank, case.b_bank, case.slot_scalings,
                plan_batch(case.token_slots[row : row + 1], case.slot_ranks),
            )  # fmt: skip
            assert torch.equal(alone[0], y[row])
            slot = int(case.token_slots[row])
            if slot >= 0:
                rank = int(case.slot_ranks[slot])
                single = lora_linear(
                    case.x[row : row + 1], case.weight, case.bias,
                    case.a_bank[slot, :rank], case.b_bank[slot, :, :rank], case.slot_scalings[slot],
                )  # fmt: skip
                assert torch.equal(single[0], y[row])


@pytest.mark.parametrize("stored_by", ["rows", "columns"])
def test_dtypes_of_the_adapters_of_other_rows_change_no_bit(backend, stored_by):
    case = make_multi(16, 49, 95, 4, 2, torch.bfloat16)
    weight = case.weight if stored_by == "rows" else case.weight.t().contiguous().t()
    adapters = [case.a_bank[0], case.a_bank[1].float()], [case.b_bank[0], case.b_bank[1].float()]
    slots = torch.tensor([0, 1] * 8)

    def run(rows):
        plan = plan_batch(slots[:rows], num_slots=2)
        return multi_lora_linear(case.x[:rows], weight, None, *adapters, case.slot_scalings, plan)

    with lk.use_backend(backend, batch_invariant=True):
        assert torch.equal(run(16)[:1], run(1))


@pytest.mark.parametrize("slices", [None, 2])
def test_shrink_and_expand_are_the_two_halves(backend, slices):
    splits = None if slices is None else [30, 18]
    case = make_multi(11, 32, 48, 6, 3, slices=slices)
    plan = plan_batch(case.token_slots, case.slot_ranks)
    h = lora_shrink(case.x, case.a_bank, plan)
    assert h.dtype == torch.float32
    assert (h[case.token_slots == -1] == 0).all()
    y = F.linear(case.x, case.weight, case.bias)
    assert lora_expand_(y, h, case.b_bank, case.slot_scalings, plan, out_splits=splits) is y
    torch.testing.assert_close(y.double(), exact(case, splits), rtol=1e-5, atol=1e-5)
    turned = F.linear(case.x, case.weight, case.bias).t().contiguous().t()
    lora_expand_(turned, h, case.b_bank, case.slot_scalings, plan, out_splits=splits)
    torch.testing.assert_close(turned, y)


@pytest.mark.parametrize("form", ["bank", "list"])
@pytest.mark.parametrize("slices", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(backend, form, slices, dtype):
    splits = None if slices is None else [20, 12]
    case = make_multi(14, 24, 32, 5, 4, dtype, slices=slices)
    if form == "list":
        case.slot_ranks.fill_(5)
    dy = torch.randn(14, 32).to(dtype)

    def grads(double):
        to = torch.float64 if double else dtype
        leaves = [t.detach().to(to).requires_grad_() for t in (case.x, case.weight, case.bias)]
        a_bank, b_bank = (t.detach().to(to).requires_grad_() for t in (case.a_bank, case.b_bank))
        x, weight, bias = leaves
        if double:
            y = exact_multi_lora_linear(
                x, weight, bias, a_bank, b_bank, case.slot_scalings, case.token_slots, case.slot_ranks, splits
            )
        else:
            ranks = case.slot_ranks if form == "bank" else None
            plan = plan_batch(case.token_slots, ranks, num_slots=4)
            banks = (a_bank, b_bank) if form == "bank" else (list(a_bank.unbind()), list(b_bank.unbind()))
            y = multi_lora_linear(x, weight, bias, *banks, case.slot_scalings, plan, out_splits=splits)
        y.backward(dy.to(to))
        return [t.grad for t in (*leaves, a_bank, b_bank)]

    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    for name, ours, expected in zip(("x", "weight", "bias", "a", "b"), grads(False), grads(True), strict=True):
        error = (ours.double() - expected).norm() / (expected.norm() + 1e-12)
        assert error < rtol, (name, error)


@pytest.mark.parametrize("form", ["bank", "list"])
def test_gradients_of_strided_adapters(backend, form):
    case = make_multi(14, 24, 32, 5, 4)
    case.slot_ranks.fill_(5)
    plan = plan_batch(case.token_slots, num_slots=4)

    def grads(strided):
        banks = []
        for bank in (case.a_bank, case.b_bank):
            bank = bank.detach().transpose(1, 2).contiguous().transpose(1, 2) if strided else bank.detach().clone()
            banks.append(bank.requires_grad_())
        given = banks if form == "bank" else [list(bank.unbind()) for bank in banks]
        multi_lora_linear(case.x, case.weight, case.bias, *given, case.slot_scalings, plan).sum().backward()
        return [bank.grad for bank in banks]

    torch.testing.assert_close(grads(True), grads(False), rtol=1e-5, atol=1e-5)


def test_out_is_written(backend):
    case = make_multi(8, 16, 24, 4, 3)
    out = torch.full((2, 4, 24), float("nan"))
    plan = plan_batch(case.token_slots, case.slot_ranks)
    args = (case.weight, case.bias, case.a_bank, case.b_bank, case.slot_scalings, plan)
    assert multi_lora_linear(case.x.view(2, 4, 16), *args, out=out) is out
    assert torch.equal(out.view(8, 24), run(case))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 4), max_size=40), st.integers(0, 8))
def test_plan(slots, spare):
    plan = plan_batch(torch.tensor(slots, dtype=torch.int64), num_slots=5)
    reused = BatchPlan.empty(len(slots) + spare, 5, 8)
    plan_batch([4] * len(slots), out=reused)
    plan_batch(torch.tensor(slots, dtype=torch.int64), torch.tensor([1, 2, 3, 4, 5]), out=reused)
    for each in (plan, reused):
        starts, order = each.segment_starts.tolist(), each.row_order.tolist()
        assert each.num_tokens == len(slots)
        assert starts[0] == 0
        assert starts[-1] == len(slots)
        for slot in range(-1, 5):
            expected = [row for row, value in enumerate(slots) if value == slot]
            assert order[starts[slot + 1] : starts[slot + 2] if slot < 5 else None][: len(expected)] == expected
    assert reused.slot_ranks.tolist() == [1, 2, 3, 4, 5]


def test_a_plan_keeps_ranks_of_its_own():
    ranks = torch.tensor([1, 2], dtype=torch.int32)
    plan = plan_batch([0, 1], ranks, out=BatchPlan.empty(8, 2))
    plan_batch([0, 1], [4, 4], out=plan)
    assert ranks.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_batch([0, 5], num_slots=3), "token_slots: expected slots from -1 to 2"),
        (lambda: plan_batch([-2]), "token_slots"),
        (lambda: plan_batch([0.5]), "token_slots: expected a 1-D integer"),
        (lambda: plan_batch([0], 16), r"slot_ranks: expected \(num_slots\)"),
        (lambda: plan_batch([0, 1], [4], num_slots=2), "sizes disagree"),
        (lambda: plan_batch([0, 1], [4, -1]), "slot_ranks: expected ranks >= 0, got -1"),
        (lambda: plan_batch([0, 1], [4, 2.7]), "slot_ranks: expected whole numbers"),
        (lambda: plan_batch([0] * 9, out=BatchPlan.empty(4, 2)), "at most 4 rows"),
        (lambda: plan_batch([0], num_slots=-1), "num_slots: expected a whole number >= 0, got -1"),
        (lambda: plan_batch([0], num_slots="3"), "num_slots: expected a whole number >= 0, got '3'"),
        (lambda: BatchPlan.empty(-1, 2), "max_tokens"),
    ],
)
def test_bad_plans(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_batch([0, None]), r"token_slots: expected integers, -1 for base only, got \[0, None\]"),
        (lambda: plan_batch(["sql"]), "token_slots: expected integers"),
        (lambda: plan_batch(3), "token_slots: expected integers.*got 3"),
        (lambda: plan_batch([0], [None]), r"slot_ranks: expected whole numbers, got \[None\]"),
        (lambda: plan_batch([0], out=torch.zeros(3)), "out: expected a BatchPlan .* got Tensor"),
    ],
)
def test_plans_of_other_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()
