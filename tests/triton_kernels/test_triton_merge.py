"""``merge_``, ``unmerge_`` and ``switch_`` on Triton against float64: shapes, strides, the safe check."""

import pytest
import torch

from lora_kernels.ops import merge_, switch_, unmerge_
from lora_kernels.testing import DTYPES, assert_within_budget, exact_merge, make_linear

SHAPES = [(1, 1, 1), (37, 70, 5), (96, 40, 100)]


def eager_merge(weight, lora_a, lora_b, scaling):
    return (weight + ((lora_b @ lora_a) * float(scaling)).to(weight.dtype)).to(weight.dtype)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_and_unmerge(shape, dtypes, device):
    for base in (True, False):  # a big base would hide a wrong update
        case = make_linear(1, *shape, *DTYPES[dtypes], base=base, device=device)
        a, b, s = case.lora_a, case.lora_b, case.scaling
        weight = merge_(case.weight.clone(), a, b, s, safe=True)
        assert_within_budget(weight, eager_merge(case.weight, a, b, s), exact_merge(case.weight, (a, b, s)))
        back = unmerge_(weight.clone(), a, b, s)
        assert_within_budget(back, eager_merge(weight, a, b, -s), exact_merge(weight, (a, b, -s)))
        assert torch.equal(merge_(case.weight.clone(), a, b, s), weight)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_switch(shape, dtypes, device):
    """Two ranks, and two dtypes of adapters in one pass."""
    in_features, out_features, rank = shape
    old = make_linear(1, *shape, *DTYPES[dtypes], device=device)
    new = make_linear(1, in_features, out_features, rank + 30, old.weight.dtype, torch.float32, seed=1, device=device)
    terms = [(old.lora_a, old.lora_b, old.scaling), (new.lora_a, new.lora_b, 2.5)]
    weight = switch_(old.weight.clone(), *terms)
    exact = exact_merge(old.weight, (*terms[0][:2], -terms[0][2]), terms[1])
    eager = eager_merge(eager_merge(old.weight, *terms[0][:2], -terms[0][2]), *terms[1])
    assert_within_budget(weight, eager, exact)


def test_strides(device):
    """A column slice, a weight stored by columns, elements apart, factors stored the other way: the rest is left."""
    case = make_linear(1, 40, 36, 6, torch.float16, device=device)
    expected = merge_(case.weight.clone(), case.lora_a, case.lora_b, 0.5)
    frame = torch.full((36, 60), 3.0, dtype=torch.float16, device=device)
    frame[:, 9:49] = case.weight
    merge_(frame[:, 9:49], case.lora_a.t().contiguous().t(), case.lora_b.t().contiguous().t(), 0.5)
    assert torch.equal(frame[:, 9:49], expected)
    assert (frame[:, :9] == 3).all()
    assert (frame[:, 49:] == 3).all()
    turned = case.weight.t().contiguous().t()
    merge_(turned, case.lora_a, case.lora_b, 0.5)
    torch.testing.assert_close(turned, expected)
    space = torch.full((72, 120), 3.0, dtype=torch.float16, device=device)
    space[::2, ::3] = case.weight
    merge_(space[::2, ::3], case.lora_a, case.lora_b, 0.5)
    torch.testing.assert_close(space[::2, ::3], expected)
    assert (space[1::2] == 3).all()
    assert (space[:, 1::3] == 3).all()


@pytest.mark.parametrize("where", ["weight", "lora_a", "lora_b", "overflow"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_leaves_the_weight_alone(where, value, device):
    case = make_linear(1, 40, 36, 6, torch.float16, device=device)
    if where == "overflow":
        case.weight[35, 39] = torch.finfo(torch.float16).max
        case.lora_b[35], case.lora_a[:, 39] = 30.0, 300.0
    else:
        getattr(case, where)[3, 2] = value
    before = case.weight.clone()
    with pytest.raises(ValueError, match="Inf or NaN"):
        merge_(case.weight, case.lora_a, case.lora_b, 1.0, safe=True)
    assert torch.equal(case.weight.view(torch.int16), before.view(torch.int16))


def test_empty(device):
    for shape in ((0, 5), (5, 0)):
        case = make_linear(1, *shape, 3, device=device)
        assert merge_(case.weight, case.lora_a, case.lora_b, 1.0, safe=True).shape == case.weight.shape
