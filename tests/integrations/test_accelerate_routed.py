"""``accelerate`` on adapters that PEFT routes token by token (Arrow), or lets read sums of columns (QALoRA)."""

import copy

import pytest
import torch
from test_accelerate_kinds import One, within_budget
from torch import nn

import lora_kernels as lk

peft = pytest.importorskip("peft")
from peft.tuners.lora import layer as peft_layer  # noqa: E402
from peft.tuners.lora.gptq import GPTQLoraLinear  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def forwards_of(kind, monkeypatch):
    calls, forward = [], kind.forward
    monkeypatch.setattr(kind, "forward", lambda s, *a, **k: (calls.append(s), forward(s, *a, **k))[1])
    return calls


def step(model, x, expected_dtype):
    """Output, gradients of what trains and of x."""
    model.zero_grad()
    x = x.to(expected_dtype).clone().requires_grad_()
    torch.manual_seed(4)
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {**{n: p.grad for n, p in model.named_parameters() if p.grad is not None}, "x": x.grad}


def same_steps(theirs, ours, wide, x):
    (y, grads), (got, our_grads), (exact, exact_grads) = (
        step(model, x, dtype) for model, dtype in ((theirs, x.dtype), (ours, x.dtype), (wide, torch.float64))
    )
    within_budget(got, y, exact, ulps=2)
    assert our_grads.keys() == grads.keys() == exact_grads.keys()
    assert len(grads) > 2
    for name, grad in exact_grads.items():
        allowed = 2 * (grads[name].double() - grad).norm() + 2 * torch.finfo(y.dtype).eps * grad.norm()
        assert (our_grads[name].double() - grad).norm() <= allowed, name


def arrow_model(tasks, top_k, gks=False, dropout=0.0):
    torch.manual_seed(0)
    names = [f"task_{i}" for i in range(tasks)]
    model = peft.get_peft_model(
        One(nn.Linear(24, 16)), peft.LoraConfig(r=4, target_modules=["part"], init_lora_weights=False), names[0]
    )
    for index, name in enumerate([*names[1:], *(["gks_0"] if gks else [])]):
        model.add_adapter(
            name, peft.LoraConfig(r=4, lora_alpha=3 + index, target_modules=["part"], init_lora_weights=False)
        )
    router = peft.ArrowConfig(top_k=top_k, router_temperature=0.7, use_gks=gks)
    router.task_adapter_names, router.gks_adapter_names = names, ["gks_0"] if gks else []
    config = peft.LoraConfig(r=4, target_modules=["part"], arrow_config=router, lora_dropout=dropout)
    model.add_adapter("arrow_router", config)
    model.set_adapter("arrow_router")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".task_" in name
    return model


@pytest.mark.parametrize(("tasks", "top_k", "gks"), [(1, 1, False), (5, 2, False), (3, 3, True)])
@pytest.mark.parametrize("rows", [(7,), (3, 5), (0, 5)])
def test_arrow_is_ours(tasks, top_k, gks, rows, monkeypatch):
    theirs = arrow_model(tasks, top_k, gks)
    x = torch.randn(*rows, 24)
    theirs(torch.randn(2, 24))  # makes the prototypes, from a random vector
    ours, wide = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    wide.base_model.model.part.lora_arrow["arrow_router"].prototypes.double()
    assert len(lk.accelerate(ours).replaced) == 1
    if x.numel():
        same_steps(theirs, ours, wide, x)
    with torch.no_grad():
        expected, exact = theirs(x), wide(x.double())
        calls = forwards_of(peft_layer.Linear, monkeypatch)
        within_budget(ours(x), expected, exact, ulps=2)
    assert not calls


def test_arrow_subtracts_general_knowledge_once_and_keeps_the_bits_of_dropout():
    theirs = arrow_model(3, 2, gks=True, dropout=0.5)
    ours = copy.deepcopy(theirs)
    assert lk.accelerate(ours).replaced
    x = torch.randn(6, 24)
    for _ in range(2):
        results = []
        for model in (theirs, ours):
            torch.manual_seed(2)
            results.append(model.train()(x))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    for (name, parameter), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(parameter, other), name


class Packed(nn.Module):
    """Stands in for a module with a packed weight: only its forward is known."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("packed", torch.randn(out_features, in_features))

    def forward(self, x):
        return nn.functional.linear(x, self.packed.to(x.dtype))


def packed_model(qalora, dtype, dropout=0.0):
    torch.manual_seed(1)
    options = {"r": 4, "init_lora_weights": False, "lora_dropout": dropout}
    config = peft.LoraConfig(use_qalora=qalora, qalora_group_size=8, **options)
    layer = GPTQLoraLinear(Packed(24, 16), "a", config=config, r=4, lora_alpha=6)
    layer.update_layer("plain", 3, lora_alpha=2, config=peft.LoraConfig(**options))
    for parameter in layer.parameters():
        nn.init.normal_(parameter.data, std=0.3)
    layer.to(dtype)
    for part in (*layer.lora_A.values(), *layer.lora_B.values()):
        part.float()
    return One(layer)


@pytest.mark.parametrize("qalora", [True, False])
@pytest.mark.parametrize("active", ["a", ["plain", "a"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_over_packed_weights_are_ours(qalora, active, dtype, monkeypatch):
    theirs = packed_model(qalora, dtype)
    theirs.part.set_adapter(active)
    ours, wide = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    report = lk.accelerate(ours)
    assert len(report.replaced) == 1
    x = torch.randn(3, 5, 24).to(dtype)
    same_steps(theirs, ours, wide, x)
    with torch.no_grad():
        expected, exact = theirs(x), wide(x.double())
        calls = forwards_of(GPTQLoraLinear, monkeypatch)
        within_budget(ours(x), expected, exact, ulps=2)
        assert not calls
        ours.part.enable_adapters(False)
        assert torch.equal(ours(x), ours.part.base_layer(x))
    ours.part.enable_adapters(True)
    assert lk.restore(ours) == 1
    assert type(ours.part) is GPTQLoraLinear


def test_dropout_of_qalora_is_that_of_peft():
    theirs = packed_model(True, torch.float32, dropout=0.5).train()
    ours = copy.deepcopy(theirs)
    assert lk.accelerate(ours).replaced
    x, results = torch.randn(6, 24), []
    for model in (theirs, ours):
        torch.manual_seed(3)
        results.append(model(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
