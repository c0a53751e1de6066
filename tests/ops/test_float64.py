"""float64: the references compute in it, so that every public function can be checked by finite differences."""

import pytest
import torch
from torch.autograd import gradcheck

import lora_kernels as lk
from lora_kernels import ops
from lora_kernels.ops.dora.api import row_norm
from lora_kernels.ops.embedding.api import lora_embedding
from lora_kernels.ops.grouped.api import grouped_lora_linear


def draw(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


X, W, BIAS, A, B = draw(2, 3, 5), draw(4, 5), draw(4), draw(2, 5), draw(4, 2)
SEED, PLAN = torch.tensor(7), ops.plan_batch([0, -1, 1, 1, 0, -1], num_slots=2)
SCALINGS = torch.tensor([0.3, 1.7], dtype=torch.float64)


def linear(x, weight, bias, a, b):
    return ops.lora_linear(x, weight, bias, a, b, 1 / 3)


def dropped(x, weight, bias, a, b):
    return ops.lora_linear(x, weight, bias, a, b, 1 / 3, dropout_p=0.4, dropout_seed=SEED)


def added(x, weight, bias, a, b):
    return ops.lora_add_(torch.nn.functional.linear(x, weight, bias), x, a, b, 1 / 3)


def sliced(x, weight, bias, a, b):
    return ops.lora_linear(x, weight, bias, torch.stack([a, a * 2]), b, 1 / 3, out_splits=[1, 3])


def listed(x, weight, bias, a, b):
    return ops.multi_lora_linear(x, weight, bias, [a, a * 2], [b, b * 3], SCALINGS, PLAN)


def banked(x, weight, bias, a, b):
    return ops.multi_lora_linear(x, weight, bias, torch.stack([a, a * 2]), torch.stack([b, b * 3]), SCALINGS, PLAN)


def grouped(x, weight, bias, a, b):
    return grouped_lora_linear(x, [weight, weight * 2], [bias, None], [a, a * 3], [b, b], [1 / 3, 0.7])


@pytest.mark.parametrize("function", [linear, dropped, added, sliced, listed, banked, grouped])
def test_gradients_by_finite_differences(function):
    assert gradcheck(function, (X, W, BIAS, A, B))


def test_gradients_of_an_embedding():
    ids, weight = torch.tensor([[1, 3], [3, 0]]), draw(5, 4).detach()
    assert gradcheck(lambda a, b: lora_embedding(ids, weight, a, b, 1 / 3, padding_idx=2), (A, B))


def test_values():
    with torch.no_grad():
        update = B @ A / 3
        want = X @ (W + update).T + BIAS
        near = {"rtol": 1e-14, "atol": 1e-14}
        torch.testing.assert_close(linear(X, W, BIAS, A, B), want, **near)
        torch.testing.assert_close(linear(X, W, BIAS, A.float(), B.float()), want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(row_norm(W, A, B, 1 / 3), (W + update).norm(dim=1), **near)
        merged = ops.merge_(W.detach().clone(), A, B, 1 / 3)
        torch.testing.assert_close(merged, W + update, **near)
        other = ops.switch_(merged, (A, B, 1 / 3), (A, B, 0.7))
        torch.testing.assert_close(other, W + B @ A * 0.7, **near)
        torch.testing.assert_close(ops.unmerge_(other, A, B, 0.7), W, **near)
        h = ops.lora_shrink(X.view(6, 5), torch.stack([A, A]), PLAN)
        assert h.dtype is torch.float64
        y = ops.lora_expand_(torch.zeros(6, 4, dtype=torch.float64), h, torch.stack([B, B]), SCALINGS, PLAN)
        scale = torch.tensor([0.3, 0, 1.7, 1.7, 0.3, 0], dtype=torch.float64)[:, None]
        torch.testing.assert_close(y, X.view(6, 5) @ A.T @ B.T * scale, **near)


def test_autocast_leaves_it_alone():
    with torch.autocast("cpu", torch.bfloat16):
        for function in (linear, listed):
            assert torch.equal(function(X, W, BIAS, A, B), torch.no_grad()(function)(X, W, BIAS, A, B))


def test_a_named_backend_says_that_it_has_none():
    with lk.use_backend("cpu"), pytest.raises(RuntimeError, match="no kernel for float64; the reference has"):
        linear(X, W, BIAS, A, B)
    with lk.use_backend("reference"):
        assert linear(X, W, BIAS, A, B).dtype is torch.float64


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_a_list_of_several_widths(dtypes):
    weights = [torch.randn(12, 8, dtype=dtype) for dtype in dtypes]
    adapters = [(torch.randn(3, 8, dtype=dtype), torch.randn(12, 3, dtype=dtype), 0.5) for dtype in dtypes]
    one = [ops.merge_(w.clone(), *adapter) for w, adapter in zip(weights, adapters, strict=True)]
    ops.merge_list_(weights, adapters)
    assert all(map(torch.equal, weights, one))
