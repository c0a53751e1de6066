"""The CUDA merge family, its source run on the host: error budget, lists, strides, what it refuses."""

import pytest
import torch
from torch.testing import assert_close

from lora_kernels.ops import library as ops
from lora_kernels.ops.merge import reference
from lora_kernels.testing import assert_within_budget

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1), (7, 33, 19), (64, 128, 16), (65, 131, 8), (130, 264, 33)]
pytestmark = pytest.mark.usefixtures("library")


def _case(n, k, r, dtype, adapter_dtype=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=g)  # noqa: E731
    a, b = draw(r, k).to(adapter_dtype or dtype), draw(n, r).to(adapter_dtype or dtype)
    return draw(n, k).to(dtype), a, b, torch.tensor(0.7)


def _exact(weight, *terms):
    total = weight.double()
    for a, b, scale in terms:
        total = total + scale.double() * (b.double() @ a.double())
    return total


def _eager(weight, *terms):
    total = weight
    for a, b, scale in terms:
        total = total + (b.to(weight.dtype) @ a.to(weight.dtype)) * scale.to(weight.dtype)
    return total


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_merge(shape, dtype, sign, schedule):
    for adapter_dtype in {dtype, torch.float32}:
        weight, a, b, scale = _case(*shape, dtype, adapter_dtype)
        ours = weight.clone()
        ops.cuda_op("merge_")(ours, a, b, scale, sign)
        terms = (a, b, sign * scale)
        assert_within_budget(ours, _eager(weight, terms), _exact(weight, terms), f"{shape} {adapter_dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_switch_in_one_rounding(dtype, schedule):
    weight, a, b, scale = _case(70, 140, 5, dtype)
    _, new_a, new_b, new_scale = _case(70, 140, 17, dtype, torch.float32, seed=1)
    ours = weight.clone()
    ops.cuda_op("switch_")(ours, a, b, scale, new_a, new_b, new_scale)
    terms = (a, b, -scale), (new_a, new_b, new_scale)
    assert_within_budget(ours, _eager(weight, *terms), _exact(weight, *terms))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_merged_in_place_and_nothing_beside_them_is_touched(dtype, library):
    weight, a, b, scale = _case(67, 90, 6, dtype)
    for columns in (slice(3, 93), slice(8, 98)):  # not at 16 bytes, and there
        room = torch.full((67, 200), torch.nan, dtype=dtype)
        view = room[:, columns]
        view.copy_(weight)
        ops.cuda_op("merge_")(view, a.t().contiguous().t(), b.t().contiguous().t(), scale, 1.0)
        alone = weight.clone()
        ops.cuda_op("merge_")(alone, a, b, scale, 1.0)
        assert torch.equal(view, alone)
        room[:, columns] = torch.nan
        assert room.isnan().all()


def _list(count):
    """Weights of several dtypes and sizes, some empty."""
    shapes = [SHAPES[i % len(SHAPES)] if i % 7 != 3 else (0, 5, 2) for i in range(count)]
    return [_case(*shape, DTYPES[i % 3], seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("count", [1, 2, 3, 120])
def test_a_list_gives_the_bits_of_one_after_the_other(count, library):
    cases = _list(count)
    alone = [case[0].clone() for case in cases]
    for weight, case in zip(alone, cases, strict=True):
        ops.cuda_op("merge_")(weight, *case[1:], -1.0)
    together = [case[0].clone() for case in cases]
    ops.cuda_op("merge_list_")(together, *([case[i] for case in cases] for i in (1, 2, 3)), -1.0)
    assert all(map(torch.equal, together, alone))


def test_a_list_with_one_bad_weight_changes_none(library):
    cases = _list(3)
    cases[2] = (cases[2][0].t(), *cases[2][1:])
    lists = [[case[i] for case in cases] for i in range(4)]
    before = [weight.clone() for weight in lists[0]]
    with pytest.raises(RuntimeError, match="adjacent columns"):
        ops.cuda_op("merge_list_")(*lists, 1.0)
    assert all(map(torch.equal, lists[0], before))
    with pytest.raises(RuntimeError, match="as many"):
        ops.cuda_op("merge_list_")(lists[0], lists[1][:2], *lists[2:], 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_or_not(dtype, library):
    check = ops.cuda_op("merge_is_finite")
    weight, a, b, scale = _case(65, 130, 3, dtype)
    before = weight.clone()
    assert check(weight, a, b, scale, 1.0)
    assert torch.equal(weight, before)
    for tensor in (weight, a, b):
        kept = tensor[-1, -1].clone()
        tensor[-1, -1] = torch.inf
        assert not check(weight, a, b, scale, 1.0)
        tensor[-1, -1] = kept


def test_the_reference_takes_lists_too():
    cases = _list(5)
    lists = [[case[i].clone() for case in cases] for i in range(4)]
    reference.merge_list_(*lists, 1.0)
    for ours, case in zip(lists[0], cases, strict=True):
        exact = _exact(case[0], (case[1], case[2], case[3]))
        assert_close(ours.double(), exact, rtol=2**-7, atol=1e-5)
