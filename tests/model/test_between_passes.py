"""What happens between forward and backward, and around a training step, beside PEFT."""

import copy

import pytest
import torch
import torch.nn.modules.module as every_module
from torch import nn

import lora_kernels as lk
from lora_kernels.helpers import rescale_adapter_scale

from .models import randomize, tiny, token_ids

peft = pytest.importorskip("peft")
peft_helpers = pytest.importorskip("peft.helpers")
pytestmark = pytest.mark.filterwarnings("ignore")


def pair(make=tiny, names=("default",), options=None, **values):
    """The same model with the same adapters of PEFT and of ours, in training."""
    models = []
    for package in (peft, lk):
        config = package.LoraConfig(r=4, lora_alpha=8, **{"target_modules": ["q_proj", "v_proj"], **values})
        model = package.get_peft_model(make(), config, names[0], **(options or {}))
        for name in names[1:]:
            model.add_adapter(name, config)
        models.append(randomize(model).train())
    return models


def gradients(model, ids=None):
    model(token_ids() if ids is None else ids).float().square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def same(found, expected, near=1e-5):
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found, expected, rtol=near, atol=near)


@pytest.mark.parametrize("values", [{}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj"]}])
def test_a_rescaling_that_ends_before_the_backward(values):
    found = []
    for model, context in zip(pair(**values), (peft_helpers.rescale_adapter_scale, rescale_adapter_scale), strict=True):
        with context(model, 0.5):
            loss = model(token_ids()).square().sum()
        loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    same(found[1], found[0])


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("part", ["lora_dropout.default", "lora_A.default", "base_layer", "every"])
def test_hooks_that_change_what_passes(part, kind):
    hooked = nn.Linear, nn.Identity

    def forward(module, args, y):
        return y * 1.5 if module.__class__ in hooked else None

    def backward(module, dx, dy):
        return tuple(None if d is None else d * 1.5 for d in dx) if module.__class__ in hooked else None

    found = []
    for model in pair():
        if part == "every":
            add = "register_module_forward_hook" if kind == "forward" else "register_module_full_backward_hook"
            handles = [getattr(every_module, add)(forward if kind == "forward" else backward)]
        else:
            add = "register_forward_hook" if kind == "forward" else "register_full_backward_hook"
            parts = [module for name, module in model.named_modules() if name.endswith(part)]
            handles = [getattr(module, add)(forward if kind == "forward" else backward) for module in parts]
        try:
            found.append(gradients(model))
        finally:
            for handle in handles:
                handle.remove()
    same(found[1], found[0])


def test_a_frozen_a_keeps_no_activations():
    """What LoRA-FA is for: as in PEFT, the inputs of the layers are not kept for the backward."""
    kept = []
    for model in pair(lambda: tiny().requires_grad_(False)):
        held = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name)
        sizes = {}

        def pack(t, held=held, sizes=sizes):
            if t.untyped_storage().data_ptr() not in held:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        layer = model.base_model.model.layers[0].v_proj
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(torch.randn(64, 16))
        assert sum(sizes.values()) < 64 * 16 * 4, sizes
        y.sum().backward()
        kept.append(layer.lora_A["default"].weight.grad)
    assert kept == [None, None]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("over", ["lora_linear", "lora_add_"])
def test_gradients_of_b_alone_have_the_bits_they_have_beside_those_of_a(over, dropout):
    model = pair(lora_dropout=dropout)[1]
    layer = model.base_model.model.layers[0].v_proj
    if over == "lora_add_":
        layer.base_layer.register_forward_hook(lambda module, args, y: y)
    found, x = [], torch.randn(5, 16)
    for trained in (True, False):
        layer.zero_grad()
        layer.lora_A["default"].weight.requires_grad_(trained)
        torch.manual_seed(3)
        layer(x).square().sum().backward()
        found.append(layer.lora_B["default"].weight.grad)
    assert torch.equal(*found)


def test_a_base_weight_that_no_gradient_reads_may_change_before_the_backward():
    found = []
    for model in pair():
        layer = model.base_model.model.layers[0].v_proj
        y = layer(torch.ones(3, 16))
        with torch.no_grad():
            layer.base_layer.weight.add_(1)
        y.square().sum().backward()
        found.append([layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad])
    same(found[1], found[0])


def test_autocast_to_another_half_precision_than_that_of_the_adapters():
    found = []
    for model in pair(lambda: tiny(dtype=torch.bfloat16), options={"autocast_adapter_dtype": False}):
        layer = model.base_model.model.layers[0].q_proj
        with torch.autocast("cpu", torch.float16):
            y = layer(torch.linspace(-1, 1, 48).view(3, 16))
        y.float().square().sum().backward()
        found.append([y.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert [t.dtype for t in found[1]] == [t.dtype for t in found[0]]
    same([t.float() for t in found[1]], [t.float() for t in found[0]], 2e-2)


def test_several_adapters_train_compiled():
    found = []
    for model in pair(names=("default", "b")):
        model.base_model.set_adapter(["default", "b"])
        found.append(gradients(torch.compile(model, fullgraph=True, backend="aot_eager")))
    same(found[1], found[0])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("active", [["default"], ["default", "b"]])
def test_export_with_gradients_on(active, strict):
    model = pair(names=("default", "b"))[1].eval()
    model.base_model.set_adapter(active)
    base, other = model.get_base_model(), token_ids(5)
    program = torch.export.export(base, (token_ids(),), strict=strict)
    torch.testing.assert_close(program.module()(other), base(other))


def test_function_transforms_are_refused_by_name():
    model = pair()[1]
    with pytest.raises(RuntimeError, match=r"lora_linear: the transforms of torch.func"):
        torch.func.vmap(lambda ids: model(ids[None])[0])(token_ids())


def test_a_lazy_layer_is_refused_until_it_has_a_weight():
    base = nn.Sequential(nn.LazyLinear(4))
    before = copy.deepcopy(base)
    with pytest.raises(ValueError, match="base_layer: a LazyLinear has no weight yet"):
        lk.get_peft_model(base, lk.LoraConfig(target_modules=["0"]))
    assert str(base) == str(before)
    base(torch.ones(2, 3))
    lk.get_peft_model(base, lk.LoraConfig(target_modules=["0"]))
