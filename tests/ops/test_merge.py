"""merge_, unmerge_, switch_ through the public functions, on every backend."""

import pytest
import torch

from lora_kernels.ops import lora_linear, merge_, merge_list_, switch_, unmerge_, unmerge_list_
from lora_kernels.ops.merge import api
from lora_kernels.testing import assert_within_budget, exact_merge, make_linear

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="f32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float16, id="f16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-f32"),
    pytest.param(torch.float16, torch.float32, id="f16-f32"),
]
SHAPES = [(1, 1, 1), (37, 29, 5), (64, 48, 16), (130, 257, 33), (96, 40, 200)]


def eager_merge(weight, lora_a, lora_b, scaling):
    return (weight + ((lora_b @ lora_a) * float(scaling)).to(weight.dtype)).to(weight.dtype)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(backend, dtype, adapter_dtype, shape, safe):
    in_features, out_features, rank = shape
    case = make_linear(1, in_features, out_features, rank, dtype, adapter_dtype)
    a, b, s = case.lora_a, case.lora_b, case.scaling
    weight = case.weight.clone()
    assert merge_(weight, a, b, s, safe=safe) is weight
    assert_within_budget(weight, eager_merge(case.weight, a, b, s), exact_merge(case.weight, (a, b, s)))
    back = weight.clone()
    unmerge_(back, a, b, s)
    assert_within_budget(back, eager_merge(weight, a, b, -s), exact_merge(weight, (a, b, -s)))


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_switch(backend, dtype, adapter_dtype, shape):
    in_features, out_features, rank = shape
    old = make_linear(1, in_features, out_features, rank, dtype, adapter_dtype)
    new = make_linear(1, in_features, out_features, rank + 3, dtype, torch.float32, seed=1)
    weight = old.weight.clone()
    terms = [(old.lora_a, old.lora_b, old.scaling), (new.lora_a, new.lora_b, 2.5)]
    assert switch_(weight, *terms) is weight
    exact = exact_merge(old.weight, (*terms[0][:2], -terms[0][2]), terms[1])
    eager = eager_merge(eager_merge(old.weight, *terms[0][:2], -terms[0][2]), *terms[1])
    assert_within_budget(weight, eager, exact)


def test_a_list_gives_the_bits_of_one_after_the_other(backend):
    cases = [
        make_linear(1, 40 + i, 24, 6, dtype, seed=i) for i, dtype in enumerate([torch.bfloat16, torch.float32] * 3)
    ]
    adapters = [(case.lora_a, case.lora_b, 0.5 + i) for i, case in enumerate(cases)]
    for many, one in ((merge_list_, merge_), (unmerge_list_, unmerge_)):
        together = [case.weight.clone() for case in cases]
        many(together, adapters)
        for case, adapter, weight in zip(cases, adapters, together, strict=True):
            assert torch.equal(one(case.weight.clone(), *adapter), weight)
            assert weight._version > 0
    merge_list_([], [])


def test_a_list_with_one_bad_adapter_changes_nothing(backend):
    cases = [make_linear(1, 40, 24, 6, seed=i) for i in range(2)]
    before = [case.weight.clone() for case in cases]
    good, bad = ((case.lora_a, case.lora_b, 0.5) for case in cases)
    for adapters, error in (
        ([good, (bad[0][:, 1:], *bad[1:])], ValueError),
        ([good], ValueError),
        ([good, 3], TypeError),
    ):
        with pytest.raises(error, match="adapters"):
            merge_list_([case.weight for case in cases], adapters)
    assert all(torch.equal(case.weight, was) for case, was in zip(cases, before, strict=True))


def test_a_list_refuses_a_factor_that_lies_in_its_weight(backend):
    room = torch.randn(32, 24)
    good, bad = make_linear(1, 24, 24, 4), make_linear(1, 24, 24, 4, seed=1)
    weights, before = [good.weight, room[:24]], room.clone()
    for lora_a, lora_b in ((room[20:24], bad.lora_b), (bad.lora_a, room[4:28, 20:])):
        with pytest.raises(ValueError, match=r"weight: shares memory with adapters\[1\]"):
            merge_list_(weights, [(good.lora_a, good.lora_b, 1.0), (lora_a, lora_b, 1.0)])
    assert torch.equal(room, before)
    merge_list_(weights, [(good.lora_a, good.lora_b, 1.0), (room[24:28], bad.lora_b, 1.0)])
    assert not torch.equal(room[:24], before[:24])


def test_one_call_takes_only_weights_that_do_not_overlap(monkeypatch):
    """As on a GPU, where the kernel for lists takes weights by rows alone."""
    monkeypatch.setattr(api, "_takes_lists", lambda weight: weight.stride(1) == 1)
    calls = []
    monkeypatch.setattr(api.dispatch, "select", lambda name, weight: lambda *args: calls.append((name, args)))
    room = torch.zeros(24, 100)
    case = make_linear(1, 40, 24, 6)
    adapter = (case.lora_a, case.lora_b, 0.5)
    by_columns = torch.zeros(40, 24).t()
    weights = [torch.zeros(24, 40), torch.zeros(24, 40), by_columns, room[:, :40], room[:, 10:50], torch.zeros(24, 40)]
    merge_list_(weights, [adapter] * 6)
    assert [name for name, _ in calls] == ["merge_list_", "merge_", "merge_", "merge_list_"]
    assert [len(args[0]) for name, args in calls if name == "merge_list_"] == [2, 2]
    assert calls[1][1][0] is by_columns


def test_views(backend):
    case = make_linear(1, 40, 24, 6, torch.bfloat16)
    expected = merge_(case.weight.clone(), case.lora_a, case.lora_b, 0.5)
    frame = torch.full((24, 60), 3.0, dtype=torch.bfloat16)
    frame[:, 9:49] = case.weight
    merge_(frame[:, 9:49], case.lora_a, case.lora_b, 0.5)
    assert torch.equal(frame[:, 9:49], expected)
    assert (frame[:, :9] == 3).all()
    assert (frame[:, 49:] == 3).all()
    turned = case.weight.t().contiguous().t()
    merge_(turned, case.lora_a, case.lora_b, 0.5)
    torch.testing.assert_close(turned, expected, rtol=1e-2, atol=1e-3)
    spread = torch.zeros(48, 80, dtype=torch.bfloat16)[::2, ::2].copy_(case.weight)
    merge_(spread, case.lora_a, case.lora_b, 0.5)
    torch.testing.assert_close(spread, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("where", ["weight", "lora_a", "lora_b", "overflow"])
def test_safe_leaves_the_weight_alone(backend, where):
    case = make_linear(1, 40, 24, 6, torch.bfloat16)
    scaling = 1.0
    if where == "overflow":
        case.weight[7, 5] = torch.finfo(torch.bfloat16).max
        case.lora_b[7], case.lora_a[:, 5] = 1.0, 1e38
    else:
        getattr(case, where)[3, 2] = float("nan")
    before = case.weight.clone()
    with pytest.raises(ValueError, match="Inf or NaN"):
        merge_(case.weight, case.lora_a, case.lora_b, scaling, safe=True)
    assert torch.equal(case.weight.view(torch.int16), before.view(torch.int16))


def test_merge_between_forward_and_backward_is_noticed(backend):
    case = make_linear(4, 16, 16, 4)
    case.x.requires_grad_()
    for write in (
        lambda: merge_(case.weight, case.lora_a, case.lora_b, 1.0),
        lambda: unmerge_(case.weight, case.lora_a, case.lora_b, 1.0),
        lambda: switch_(case.weight, (case.lora_a, case.lora_b, 1.0), (case.lora_a, case.lora_b, 2.0)),
    ):
        loss = lora_linear(*case.args()).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_parameter_can_be_merged_into(backend):
    case = make_linear(1, 8, 8, 2)
    weight = torch.nn.Parameter(case.weight.clone())
    merge_(weight, case.lora_a, case.lora_b, case.scaling)
    assert weight.grad_fn is None
    with torch.inference_mode():
        inside = case.weight.clone()
        merge_(inside, case.lora_a, case.lora_b, case.scaling)
    assert torch.equal(inside, weight)
