"""What compiled calls share with eager ones: dropout masks, and gradients of what is written in place."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops import (
    dispatch,
    grouped_lora_linear,
    library,
    lora_add_,
    lora_linear,
    multi_lora_linear,
    plan_batch,
)
from lora_kernels.testing import assert_within_budget, make_linear


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_compiled_is_add(grad, dropout_p, dtype):
    case = make_linear(6, 16, 24, 4, dtype)

    def step(base, x, a, b):
        y, view = base.clone(), base.clone().view(2, 3, 24)
        lora_add_(y, x, a, b, case.scaling, dropout_p=dropout_p)
        lora_add_(view[1], x[:3], a, b, case.scaling, dropout_p=dropout_p)
        return y, view

    def results(function, dtype):
        leaves = (case.x @ case.weight.t(), case.x, case.lora_a, case.lora_b)
        leaves = [t.detach().to(dtype).requires_grad_(grad) for t in leaves]
        torch.manual_seed(3)
        found = function(*leaves)
        loss = sum(y.square().sum() for y in found)
        return [*(y.detach() for y in found), *(torch.autograd.grad(loss, leaves) if grad else ())]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found in zip(results(compiled, dtype), results(step, dtype), results(step, torch.float64), strict=True):
        assert_within_budget(*found)


@pytest.mark.parametrize("named", ["reference", "cpu", "float64"])
def test_a_named_backend_and_float64_compile(named, monkeypatch):
    monkeypatch.setattr(library, "_with_cpu_kernel", set())  # as before the first call
    name, dtype = ("auto", torch.float64) if named == "float64" else (named, torch.float32)
    if dispatch.unavailable(name) is not None:
        pytest.skip(dispatch.unavailable(name))
    x, weight, bias, a, b, s = make_linear(6, 16, 24, 4).args()
    x, weight, bias, a, b = (t.to(dtype) for t in (x, weight, bias, a, b))
    leaves, plan = [t.requires_grad_() for t in (x, a, b)], plan_batch([0, 1, -1] * 2, num_slots=2)

    def step():
        y = lora_add_(lora_linear(x, weight, bias, a, b, s), x, a, b, s)
        y = y + sum(grouped_lora_linear(x, [weight, weight + 1], None, [a, 2 * a], [b, 2 * b], [s, s]))
        return y + multi_lora_linear(x, weight, bias, [a, 2 * a], [b, 2 * b], torch.ones(2), plan)

    with lk.use_backend(name):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = [torch.autograd.grad(function().square().sum(), leaves) for function in (compiled, step)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("op", ["grouped_lora_linear", "multi_lora_linear"])
def test_a_tensor_that_comes_twice(op):
    x, weight, bias, a, b, s = make_linear(6, 16, 24, 4).args()
    leaves, plan = [t.requires_grad_() for t in (x, a, b)], plan_batch([0, 1, -1] * 2, num_slots=2)

    def step():
        if op == "multi_lora_linear":
            return multi_lora_linear(x, weight, bias, [a, a], [b, b], torch.ones(2), plan)
        return torch.cat(grouped_lora_linear(x, [weight] * 2, [bias] * 2, [a] * 2, [b] * 2, [s] * 2))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(function().square().sum(), leaves) for function in (step, compiled)]
    torch.testing.assert_close(*found)


def _step(function, x, layer):
    torch.manual_seed(5)
    leaves = [x.clone().requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]
    y = function(leaves[0])
    return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)


def _layer(kind):
    layer = lk.LoraLinear.from_linear(torch.nn.Linear(16, 24), r=4, lora_dropout=0.5, init_lora_weights=False)
    if kind == "hooked":
        layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    elif kind == "two adapters":
        layer.update_layer("b", 4, 8, lora_dropout=0.3, init_lora_weights=False)
        layer.set_adapter(["default", "b"])
    elif kind == "lora_bias":
        layer.delete_adapter("default")
        layer._active_adapter = ["b"]
        layer.update_layer("b", 4, 8, lora_dropout=0.3, init_lora_weights=False, lora_bias=True)
    return layer


@pytest.mark.parametrize("kind", ["plain", "hooked", "two adapters", "lora_bias"])
def test_a_compiled_layer_drops_what_an_eager_one_drops(kind):
    x, layer = torch.randn(2, 5, 16), _layer(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_step(compiled, x, layer), _step(layer, x, layer))


@pytest.mark.parametrize("as_eager", [False, True])
def test_masks_of_inductor_are_its_own_unless_it_is_told_to_draw_torchs(as_eager):
    x, layer = torch.randn(10, 16), _layer("plain")
    with torch._inductor.config.patch(fallback_random=as_eager):
        compiled = torch.compile(layer, fullgraph=True)
        found, again, eager = (_step(function, x, layer) for function in (compiled, compiled, layer))
    assert all(map(torch.equal, found, again))
    y, _, da, db = found
    # One mask forward and backward: the update is linear in A and in B.
    update = (2 * y * (y - layer.base_layer(x))).sum()
    for grad, factor in ((da, layer.lora_A), (db, layer.lora_B)):
        torch.testing.assert_close((grad * factor["default"].weight).sum(), update)
    assert torch.allclose(y, eager[0], atol=1e-5) is as_eager
