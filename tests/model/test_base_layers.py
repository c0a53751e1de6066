"""Base layers with hooks, a forward or a weight of their own: what they compute is what is adapted."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_kernels.layers import LoraLinear

from .layer import close, formula, make


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_on_the_base_layer_fire(kind):
    layer, calls = make(), []
    base = layer.base_layer
    register = {
        "forward": base.register_forward_hook,
        "pre": base.register_forward_pre_hook,
        "backward": base.register_full_backward_hook,
    }[kind]
    kept = []

    def hook(module, *values):
        calls.append(kind)
        kept.append(values[-1])

    handle = register(hook)
    x = torch.randn(5, 12, requires_grad=True)
    y = layer(x)
    close(y, formula(layer, x))
    y.sum().backward()
    assert calls == [kind]
    if kind == "forward":
        assert torch.equal(kept[0], F.linear(x, base.weight, base.bias))
    handle.remove()
    layer(x)
    assert calls == [kind]


class Doubled(nn.Linear):
    def forward(self, x):
        return torch.relu(super().forward(x))


def test_base_layers_of_other_kinds_run_their_own_forward():
    layer = LoraLinear.from_linear(Doubled(12, 7), r=4, lora_alpha=8, init_lora_weights=False)
    x = torch.randn(5, 12, requires_grad=True)
    update = formula(layer, x) - formula(layer, x, [])
    y = layer(x)
    close(y, torch.relu(formula(layer, x, [])) + update)
    y.sum().backward()  # relu saved its output: it must not have been written to
    base = nn.Linear(12, 7)
    torch.nn.utils.parametrizations.weight_norm(base)
    layer = LoraLinear.from_linear(base, r=4, lora_alpha=8, init_lora_weights=False)
    close(layer(x), formula(layer, x))
    with pytest.raises(ValueError, match="parametrized"):
        layer.merge()
    assert not layer.merged


class Tagged(torch.Tensor):
    pass


def test_weight_subclass_runs_and_is_not_merged_into():
    layer = make()
    weight = layer.weight.detach().as_subclass(Tagged)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(5, 12)
    close(layer(x).as_subclass(torch.Tensor), formula(layer, x).as_subclass(torch.Tensor))
    with pytest.raises(ValueError, match="weight"):
        layer.merge()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_foreign_dtype(dtype):
    layer = make()
    layer.lora_A.to(dtype)
    layer.lora_B.to(dtype)
    x = torch.randn(5, 12)
    close(layer(x), formula(layer, x))
    layer.merge()
    layer.unmerge()
