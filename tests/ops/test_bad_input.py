"""Every bad argument is named, with what was expected and what came, and nothing is written."""

import dataclasses
import re

import pytest
import torch

from lora_kernels.ops import (
    lora_add_,
    lora_expand_,
    lora_linear,
    lora_shrink,
    merge_,
    merge_exact_,
    merge_list_,
    multi_lora_linear,
    plan_batch,
    switch_,
    unmerge_,
)
from lora_kernels.testing import make_linear, make_multi

HALF = torch.bfloat16


def linear(**changes):
    case = make_linear(4, 24, 16, 4)
    keywords = {key: changes.pop(key) for key in list(changes) if not hasattr(case, key)}
    for name, value in changes.items():
        setattr(case, name, value)
    return lambda: lora_linear(*case.args(), **keywords)


LINEAR = [
    (linear(x=torch.randn(4, 23)), ValueError, "x: expected last dimension in_features = 24"),
    (linear(x=[1.0]), TypeError, "x: expected a tensor, got list"),
    (linear(x=torch.tensor(1.0)), ValueError, "x: expected at least one dimension"),
    (linear(x=torch.ones(4, 24, dtype=torch.int64)), TypeError, "x: expected float32, float16, bfloat16 or float64"),
    (linear(x=torch.randn(4, 24, dtype=torch.float64)), TypeError, "weight: expected torch.float64"),
    (linear(x=torch.randn(4, 24, dtype=HALF)), TypeError, "weight: expected torch.bfloat16"),
    (linear(weight=torch.randn(16)), ValueError, "weight: expected a 2-D tensor"),
    (linear(bias=torch.randn(15)), ValueError, r"bias: expected shape \(out_features,\) = \(16,\), got \(15,\)"),
    (linear(bias=torch.randn(16, dtype=HALF)), TypeError, "bias: expected torch.float32"),
    (linear(lora_a=torch.randn(4, 23)), ValueError, "lora_a: expected"),
    (linear(lora_a=torch.randn(0, 24), lora_b=torch.randn(16, 0)), ValueError, "lora_a: expected rank >= 1"),
    (linear(lora_b=torch.randn(16, 5)), ValueError, "lora_b: expected shape"),
    (linear(lora_b=torch.randn(15, 4)), ValueError, "lora_b: expected shape"),
    (linear(lora_a=torch.randn(4, 24, dtype=HALF)), TypeError, "lora_a: expected torch.float32"),
    (linear(lora_b=None), TypeError, "lora_b: expected a tensor, got NoneType"),
    (linear(lora_a=torch.randn(4, 24, device="meta")), ValueError, "lora_a: expected a tensor on cpu"),
    (linear(weight=torch.randn(16, 24, device="meta")), ValueError, "weight: expected a tensor on cpu"),
    (linear(scaling="2"), TypeError, "scaling: expected a float or a 0-d tensor, got str"),
    (linear(scaling=torch.ones(1)), ValueError, "scaling: expected a float or a 0-d"),
    (linear(scaling=torch.tensor(1.0, requires_grad=True)), ValueError, "scaling: gradients"),
    (linear(dropout_p=1.0), ValueError, "dropout_p: expected 0 <= p < 1"),
    (linear(dropout_p=-0.1), ValueError, "dropout_p"),
    (linear(dropout_p=0.5, dropout_seed=3), TypeError, "dropout_seed: expected a 0-d int64 tensor"),
    (linear(out_splits=[8, 9]), ValueError, "out_splits: expected widths that add up to out_features = 16"),
    (linear(out_splits=16), TypeError, "out_splits: expected a sequence of int, got 16"),
    (linear(out_splits=torch.tensor([8, 8])), TypeError, r"out_splits: expected a sequence of int, got tensor"),
    (linear(out_splits=[8.0, 8.0]), TypeError, "out_splits: expected a sequence of int"),
    (linear(out_splits=[8, 8]), ValueError, "lora_a: expected a 3-D tensor"),
    (linear(out=torch.empty(4, 15)), ValueError, "out: expected shape"),
    (linear(out=torch.empty(4, 16, dtype=HALF)), TypeError, "out: expected torch.float32"),
    (linear(out=torch.empty(4, 1).expand(4, 16)), ValueError, "out: its elements overlap"),
    (linear(out=torch.empty(4, 16, requires_grad=True)), ValueError, "out: can not be combined with gradients"),
    (linear(out=torch.empty(4, 16), lora_a=torch.randn(4, 24, requires_grad=True)), ValueError, "out: can not be"),
]


@pytest.mark.parametrize(("call", "error", "message"), LINEAR)
def test_lora_linear(backend, call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("call", "error", "message"), LINEAR)
def test_lora_linear_unforced(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_out_may_not_alias_an_input():
    frame = torch.randn(4, 40)
    case = make_linear(4, 24, 24, 4)
    for x, out in ((frame[:, :24], frame[:, :24]), (frame[:, :24], frame[:, 10:34])):
        before = frame.clone()
        with pytest.raises(ValueError, match="out: shares memory with x"):
            lora_linear(x, *case.args()[1:], out=out)
        assert torch.equal(frame, before)


def test_out_may_not_alias_a_scaling():
    case = make_linear(4, 24, 24, 4)
    out = torch.randn(4, 24)
    with pytest.raises(ValueError, match="out: shares memory with scaling"):
        lora_linear(*case.args()[:5], out[2, 3], out=out)


@pytest.mark.parametrize("name", ["a_bank", "b_bank", "lora_a[1]", "lora_b[1]", "slot_scalings"])
def test_out_of_several_adapters_may_not_alias_one(backend, name):
    case = make_multi(8, 8, 8, 8, 2)
    plan = plan_batch([0, 1, -1, 0] * 2, num_slots=2)
    if name == "slot_scalings":
        out = case.x.clone()
        case.slot_scalings = out[0, :2]
    else:
        out = (case.a_bank if name in ("a_bank", "lora_a[1]") else case.b_bank)[1]
    banks = [case.a_bank, case.b_bank]
    banks = [list(bank) for bank in banks] if name.startswith("lora") else banks
    before = out.clone()
    args = (case.x, case.weight, case.bias, *banks, case.slot_scalings, plan)
    with pytest.raises(ValueError, match="out: can not be combined with gradients"):
        multi_lora_linear(*args, out=torch.empty(8, 8, requires_grad=True))
    with pytest.raises(ValueError, match=re.escape(f"out: shares memory with {name}")):
        multi_lora_linear(*args, out=out)
    assert torch.equal(out, before)


def test_lora_add():
    case = make_linear(4, 24, 16, 4)
    y = torch.randn(4, 16)
    bad = [
        ((torch.randn(5, 16), case.x), ValueError, "y: expected leading dimensions"),
        ((torch.randn(4, 15), case.x), ValueError, "lora_b: expected shape"),
        ((y.to(HALF), case.x), TypeError, "y: expected torch.float32"),
        ((y[:, :1].expand(4, 16), case.x), ValueError, "y: its elements overlap"),
        ((y, y[:, :16]), ValueError, "lora_a: expected"),
    ]
    for (target, x), error, message in bad:
        before = target.clone()
        with pytest.raises(error, match=message):
            lora_add_(target, x, case.lora_a, case.lora_b, 1.0)
        assert torch.equal(target, before)
    square = make_linear(4, 16, 16, 4)
    with pytest.raises(ValueError, match="y: shares memory with x"):
        lora_add_(y, y, square.lora_a, square.lora_b, 1.0)


def test_multi(backend):
    case = make_multi(5, 24, 16, 4, 3)
    plan = plan_batch(case.token_slots, case.slot_ranks)
    good = [case.x, case.weight, case.bias, case.a_bank, case.b_bank, case.slot_scalings, plan]
    bad = [
        (0, torch.randn(6, 24), ValueError, "plan: made for 5 rows, x has 6"),
        (3, case.a_bank[:, :3], ValueError, "lora_b of the bank: expected shape"),
        (3, case.a_bank[0], ValueError, "a_bank: expected a 3-D tensor"),
        (3, case.a_bank.double(), TypeError, "lora_a of the bank"),
        (4, case.b_bank[:2], ValueError, "b_bank: expected 3 slots"),
        (5, torch.ones(2), ValueError, "slot_scalings: expected shape"),
        (5, torch.ones(3, dtype=torch.float64), TypeError, "slot_scalings: expected torch.float32"),
        (6, None, TypeError, "plan: expected a BatchPlan"),
        (6, plan_batch(case.token_slots, num_slots=4), ValueError, "plan: made for 4 slots, the bank has 3"),
    ]
    for index, value, error, message in bad:
        with pytest.raises(error, match=message):
            multi_lora_linear(*[value if i == index else argument for i, argument in enumerate(good)])
    lists = [*good[:3], list(case.a_bank), list(case.b_bank)[:2], *good[5:]]
    with pytest.raises(ValueError, match="b_bank: expected a list of 3"):
        multi_lora_linear(*lists)
    # A slot without rows is looked at all the same.
    few = plan_batch([0, 0, -1, 0, 0], num_slots=3)
    for index, value, error, message in [
        (3, torch.randn(4, 23), ValueError, r"lora_a\[2\]: expected \(rank, in_features = 24\)"),
        (3, torch.randn(0, 24), ValueError, r"lora_a\[2\]: expected rank >= 1"),
        (3, torch.randn(4, 24, device="meta"), ValueError, r"lora_a\[2\]: expected a tensor on cpu"),
        (3, None, TypeError, r"lora_a\[2\]: expected a tensor, got NoneType"),
        (4, torch.randn(16, 5), ValueError, r"lora_b\[2\]: expected shape"),
        (4, torch.randn(16, 4, dtype=HALF), TypeError, r"lora_b\[2\]: expected torch.float32"),
    ]:
        arguments = [*good[:3], list(case.a_bank), list(case.b_bank), good[5], few]
        arguments[index][2] = value
        with pytest.raises(error, match=message):
            multi_lora_linear(*arguments)
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        multi_lora_linear([1.0], *good[1:])
    with pytest.raises(TypeError, match=r"slot_scalings: expected torch\.float32 without gradient"):
        multi_lora_linear(*good[:5], torch.ones(3, requires_grad=True), plan)
    with pytest.raises(TypeError, match=r"out: expected torch.float32, got torch.bfloat16"):
        lora_shrink(case.x, case.a_bank, plan, out=torch.empty(case.x.shape[0], case.a_bank.shape[1], dtype=HALF))
    with pytest.raises(ValueError, match="out: shares memory with x"):
        lora_shrink(case.x, case.a_bank, plan, out=case.x[:, : case.a_bank.shape[1]])
    with pytest.raises(ValueError, match=r"x: lora_shrink computes no gradients"):
        lora_shrink(case.x.clone().requires_grad_(), case.a_bank, plan)
    by_slice = plan_batch(case.token_slots, case.slot_ranks[:, None].expand(-1, 2))
    short = dataclasses.replace(plan, slot_ranks=case.slot_ranks[:2])
    for ranks, message in ((by_slice, r"\(num_slots\) or \(num_slots, slices = 1\)"), (short, "3 slots")):
        match = rf"plan.slot_ranks: expected {message}, got shape \("
        with pytest.raises(ValueError, match=match):
            multi_lora_linear(*good[:6], ranks)
        with pytest.raises(ValueError, match=match):
            lora_shrink(case.x, case.a_bank, ranks)
        with pytest.raises(ValueError, match=match):
            lora_expand_(torch.zeros(5, 16), torch.zeros(5, 4), case.b_bank, case.slot_scalings, ranks)
    with pytest.raises(TypeError, match="h: expected a tensor, got list"):
        lora_expand_(torch.zeros(5, 16), [0.0], case.b_bank, case.slot_scalings, plan)
    with pytest.raises(ValueError, match="h: expected shape"):
        lora_expand_(torch.zeros(5, 16), torch.zeros(5, 3), case.b_bank, case.slot_scalings, plan)


def test_merge_family():
    case = make_linear(1, 24, 16, 4)
    a, b = case.lora_a, case.lora_b
    bad = [
        (lambda w: merge_(w, a[:, :5], b, 1.0), ValueError, "lora_a: expected"),
        (lambda w: merge_(w, a, b[:5], 1.0), ValueError, "lora_b: expected shape"),
        (lambda w: unmerge_(w, a[:0], b[:, :0], 1.0), ValueError, "lora_a: expected rank >= 1"),
        (lambda w: merge_(w, a.to(HALF), b, 1.0), TypeError, "lora_a: expected torch.float32"),
        (lambda w: merge_(w.int(), a, b, 1.0), TypeError, "weight: expected float32"),
        (lambda w: merge_exact_(w.double(), a, b, 1.0), TypeError, "weight: expected float32"),
        (lambda w: merge_(w[0], a, b, 1.0), ValueError, "weight: expected a 2-D tensor"),
        (lambda w: merge_(w, a, b, None), TypeError, "scaling: expected a float"),
        (lambda w: merge_(w[:1].expand(16, 24), a, b, 1.0), ValueError, "weight: its elements overlap"),
        (lambda w: merge_(w, w[:4], b, 1.0), ValueError, "weight: shares memory with lora_a"),
        (lambda w: merge_list_(3, [(a, b, 1.0)]), TypeError, "weights: expected a sequence of tensors, got int"),
        (lambda w: merge_list_([w], 3), TypeError, "adapters: expected a sequence of .*, got int"),
        (lambda w: switch_(w, (a, b), (a, b, 1.0)), TypeError, "old: expected"),
        (lambda w: switch_(w, (a, b, 1.0), (a, b[:3], 1.0)), ValueError, r"new\[1\] \(lora_b\): expected shape"),
    ]
    for call, error, message in bad:
        before = case.weight.clone()
        with pytest.raises(error, match=message):
            call(case.weight)
        assert torch.equal(case.weight, before)
