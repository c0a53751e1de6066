"""The models that the tests of ``accelerate`` share, and how their results are compared."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk

peft = pytest.importorskip("peft")
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402

from lora_kernels.integrations.peft import Linear as OurLinear  # noqa: E402

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24, bias=False)
        self.up2 = nn.Linear(24, 40)
        self.head = nn.Linear(40, 6)

    def forward(self, x):
        return self.head(torch.tanh(self.up2(x + self.down(torch.tanh(self.up(x))))))


def fill(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "hada" in name or "ia3" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def made(*names, dtype=torch.float32, targets=("up", "down", "up2"), autocast_adapter_dtype=True, **config):
    """A PEFT model with filled adapters, the first one active."""
    torch.manual_seed(5)
    config = {"r": 5, "lora_alpha": 8, "target_modules": list(targets), **config}
    first, *others = names or ("default",)
    net = Net().to(dtype)
    wrapped = peft.get_peft_model(net, peft.LoraConfig(**config), first, autocast_adapter_dtype=autocast_adapter_dtype)
    for name in others:
        wrapped.add_adapter(name, peft.LoraConfig(**{**config, "r": 3}))
    return fill(wrapped)


def batch(dtype=torch.float32, rows=(4, 7)):
    return torch.randn(*rows, 24, generator=torch.Generator().manual_seed(9)).to(dtype)


def layers(model, cls=PeftLinear):
    return [module for module in model.modules() if isinstance(module, cls)]


def pair(*names, **config):
    """The same model as PEFT made it, and accelerated."""
    theirs = made(*names, **config)
    ours = copy.deepcopy(theirs)
    report = lk.accelerate(ours)
    assert len(report.replaced) == len(layers(ours, OurLinear)) == len(layers(theirs)) > 0
    return theirs, ours


def same(got, expected):
    assert got.dtype == expected.dtype
    tolerance = TOLERANCE[expected.dtype]
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * max(1.0, largest))


def same_step(theirs, ours, x, context=None):
    """Outputs and the gradients of all that trains, and of x."""
    results = []
    for model in (theirs, ours):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        if context is None:
            y = model(inputs)
        else:
            with context():
                y = model(inputs)
        y.float().square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((y.detach(), {**grads, "x": inputs.grad}))
    (y, grads), (our_y, our_grads) = results
    same(our_y, y)
    assert our_grads.keys() == grads.keys()
    assert len(grads) > 1
    for name, grad in grads.items():
        assert our_grads[name].dtype == grad.dtype
        if y.dtype == torch.float32:
            same(our_grads[name], grad)
        else:
            assert float((our_grads[name] - grad).norm()) <= 0.03 * float(grad.norm()), name
    return our_y


def paths(monkeypatch):
    """Counts the calls of PEFT's own forward."""
    calls = []
    forward = PeftLinear.forward
    monkeypatch.setattr(PeftLinear, "forward", lambda self, *a, **k: (calls.append(self), forward(self, *a, **k))[1])
    return calls
