"""``row_norm``: against float64, also where the update cancels a row."""

import pytest
import torch

from lora_kernels.ops.dora.api import row_norm, scale_merge_, scale_unmerge_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 13, 3), (129, 2051, 16), (0, 5, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_against_float64(dtype, shape, transposed):
    rows, columns, r = shape
    weight = torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)
    weight, a, b = weight.to(dtype), torch.randn(r, columns), torch.randn(rows, r)
    before = weight.clone()
    exact = (weight.double() + 0.7 * b.double() @ a.double()).norm(dim=1)
    error = (row_norm(weight, a, b, torch.tensor(0.7)) - exact).abs()
    assert bool((error <= 4 * torch.finfo(torch.float32).eps * exact).all())
    assert torch.equal(weight, before)


def test_a_row_that_the_update_nearly_cancels_keeps_its_digits():
    a, b = torch.randn(4, 300), torch.randn(50, 4)
    weight = -(b @ a)
    weight[::2] += 1e-5 * torch.randn(25, 300)
    exact = (weight.double() + b.double() @ a.double()).norm(dim=1)
    absolute = 8 * torch.finfo(torch.float32).eps * weight.norm(dim=1)
    assert bool(((row_norm(weight, a, b, 1.0) - exact).abs() <= absolute).all())
    # the closed form loses these rows altogether
    squares = weight.square().sum(1) + 2 * ((weight @ a.t()) * b).sum(1) + ((b @ (a @ a.t())) * b).sum(1)
    assert bool(((squares.clamp_min(0).sqrt() - exact).abs() > absolute).any())


def test_merge_and_unmerge_with_factors():
    weight, a, b, factors = torch.randn(70, 33), torch.randn(4, 33), torch.randn(70, 4), torch.rand(70) + 0.5
    before = weight.clone()
    scale_merge_(weight, a, b, 0.5, factors)
    torch.testing.assert_close(weight, factors[:, None] * (before + 0.5 * b @ a))
    scale_unmerge_(weight, a, b, 0.5, factors)
    torch.testing.assert_close(weight, before)


@pytest.mark.parametrize("argument", ["weight", "lora_a", "lora_b"])
def test_bad_shapes_are_named(argument):
    arguments = {"weight": torch.randn(5, 4), "lora_a": torch.randn(2, 4), "lora_b": torch.randn(5, 2), "scaling": 1.0}
    arguments[argument] = torch.randn(3)
    with pytest.raises(ValueError, match=argument):
        row_norm(**arguments)
