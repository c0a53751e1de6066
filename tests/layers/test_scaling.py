"""A scaling that changes between a forward and its backward, where its memory has to stay for graphs that read it."""

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.layers.scaling import overwritten

KINDS = {
    "linear": (lambda: nn.Linear(8, 6), (3, 8), {}),
    "lora_bias": (lambda: nn.Linear(8, 6), (3, 8), {"lora_bias": True}),
    "dora": (lambda: nn.Linear(8, 6), (3, 8), {"use_dora": True}),
    "conv": (lambda: nn.Conv1d(8, 6, 3), (2, 8, 5), {}),
    "embedding": (lambda: nn.Embedding(8, 6), None, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rescaling_between_the_passes_on_another_device_than_a_cpu(kind):
    make, shape, options = KINDS[kind]
    x = torch.zeros(3, dtype=torch.long) if shape is None else torch.zeros(shape)
    model = lk.get_peft_model(nn.Sequential(make()), lk.LoraConfig(r=2, target_modules=["0"], **options)).to("meta")
    (layer,) = model.base_model.lora_layers()
    loss = model(x.to("meta")).square().sum()
    layer.set_scale("default", 3.0)
    loss.backward()
    model(x.to("meta")).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compiled", [False, True])
def test_who_saved_a_scaling_keeps_its_value(mode, compiled):
    x = torch.randn(5, requires_grad=True)
    held = {"scaling": torch.tensor(2.0)}
    place = held["scaling"].data_ptr()

    def times(x):
        return (x * held["scaling"]).sin()

    function = torch.compile(times, backend="aot_eager") if compiled else times
    y = []
    for value in (2.0, 5.0, 7.0):
        with mode():
            held["scaling"] = overwritten(held["scaling"], value)
        y.append(function(x))
    assert held["scaling"].data_ptr() == place
    assert held["scaling"].item() == 7.0
    for value, each in zip((2.0, 5.0, 7.0), y, strict=True):
        torch.testing.assert_close(each, (x * value).sin())
        torch.testing.assert_close(torch.autograd.grad(each.sum(), x)[0], value * (x * value).cos())
