"""An adapter that is not trained yet (B = 0): in float32 the bits of the base model, as in PEFT.

Half precision has kernels of its own, several times faster than torch's on many CPUs, and products of up to 1,024
multiplications are cheaper than a call of the vendor's GEMM: both are within the error budget of the base instead.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_kernels as lk
from lora_kernels.testing import assert_within_budget

peft = pytest.importorskip("peft")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mlp():
    torch.manual_seed(0)
    layers = nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 64, bias=False), nn.Tanh(), nn.Linear(64, 130)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_outputs_are_those_of_the_base_model(dropout):
    base = mlp()
    config = {"target_modules": ["0", "2", "4"], "lora_dropout": dropout, "r": 5}
    ours = lk.get_peft_model(copy.deepcopy(base), lk.LoraConfig(**config))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    for shape in ((), (1,), (2,), (5,), (16,), (40,), (130,), (2, 7), (2, 3, 5)):
        x = torch.randn(*shape, 33)
        for mode in (True, False):
            y = base.train(mode)(x)
            assert torch.equal(theirs.train(mode)(x), y)
            assert torch.equal(ours.train(mode)(x), y), shape
            with torch.inference_mode():
                assert torch.equal(ours(x), y), shape


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("bias", [True, False])
def test_untrained_dora_gives_the_bits_of_the_base(kind, bias):
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(600, 700, bias=bias) if kind is nn.Linear else kind(6, 8, 3, bias=bias))
    x = torch.randn(9, 600) if kind is nn.Linear else torch.randn(2, 6, *[5] * (base[0].weight.dim() - 2))
    for package in (peft, lk):
        config = package.LoraConfig(target_modules=["0"], use_dora=True)
        assert torch.equal(package.get_peft_model(copy.deepcopy(base), config)(x), base(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_step_trains_b_and_leaves_a(dtype):
    torch.manual_seed(2)
    x, w, dy = torch.randn(6, 40).to(dtype), torch.randn(30, 40).to(dtype), torch.randn(6, 30).to(dtype)
    a, b = torch.randn(4, 40, requires_grad=True), torch.zeros(30, 4, requires_grad=True)
    lk.ops.lora_linear(x, w, None, a, b, 0.5).backward(dy)
    assert not a.grad.any()
    exact = 0.5 * dy.double().T @ (x.double() @ a.double().T)
    eager = 0.5 * dy.float().T @ (x.float() @ a.detach().T)
    assert_within_budget(b.grad, eager, exact)


def test_only_a_zero_update_is_left_out():
    """One number of B, NaN and Inf in either factor, and the signs of zeros."""
    torch.manual_seed(3)
    x, w, a = torch.randn(3, 24), torch.randn(17, 24), torch.randn(6, 24)
    plain = F.linear(x, w)
    for value in (1.0, torch.nan, torch.inf, 2.0**-149):
        for where in ((0, 0), (16, 5), (9, 3)):
            b = torch.zeros(17, 6)
            b[where] = value
            y = lk.ops.lora_linear(x, w, None, a, b, 2.0**20)
            expected = plain + 2.0**20 * (x @ a.T) @ b.T
            # h is a sum of 24 float32 products, of which both sides round every one
            torch.testing.assert_close(y, expected, rtol=24 * 2.0**-23, atol=1e-5, equal_nan=True)
            assert value == 2.0**-149 or not torch.equal(y[:, where[0]], plain[:, where[0]])
    assert torch.equal(lk.ops.lora_linear(x, w, None, a, -torch.zeros(17, 6), 1.0), plain)
    assert torch.equal(lk.ops.lora_linear(x, w, None, a, torch.zeros(17, 9)[:, 2:8], 1.0), plain)
    a[3, 7] = torch.nan
    assert lk.ops.lora_linear(x, w, None, a, torch.zeros(17, 6), 1.0).isnan().all()


def test_rows_stay_independent_of_their_number_where_that_is_asked_for():
    torch.manual_seed(4)
    x, w, a, b = torch.randn(70, 48), torch.randn(40, 48), torch.randn(4, 48), torch.zeros(40, 4)
    with lk.use_backend("auto", batch_invariant=True):
        whole = lk.ops.lora_linear(x, w, None, a, b, 1.0)
        for rows in (1, 3, 33):
            assert torch.equal(lk.ops.lora_linear(x[:rows], w, None, a, b, 1.0), whole[:rows])
