"""``accelerate`` on the variants of LoRA that ``peft`` has: what plain LoRA computes is ours, all keep working."""

import copy
import dataclasses
import importlib.util
import sys
import types

import pytest
import torch
from accelerate_cases import OurLinear, layers
from test_accelerate_kinds import One, within_budget
from torch import nn

import lora_kernels as lk

peft = pytest.importorskip("peft")
from peft.tuners.lora import layer as peft_layer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

VARIANTS = {
    "mica": {"init_lora_weights": "mica"},
    "kasa": {"kasa_config": ("KasaConfig", {})},
    "monteclora": {"monteclora_config": ("MontecloraConfig", {})},
    "velora": {"velora_config": ("VeloraConfig", {"num_groups": 2})},
    "bdlora": {"use_bdlora": ("BdLoraConfig", {"target_modules_bd_a": ["part"], "nblocks": 2})},
    "bdlora_b": {"use_bdlora": ("BdLoraConfig", {"target_modules_bd_b": ["part"], "nblocks": 2})},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "rslora": {"use_rslora": True},
}


def variant_config(name):
    values = dict(VARIANTS[name])
    for field, value in values.items():
        if isinstance(value, tuple):
            import peft.tuners.lora.config as configs

            cls = getattr(configs, value[0], None) or getattr(peft, value[0])
            values[field] = cls(**value[1])
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=["part"], **values)


def variant_model(name):
    torch.manual_seed(1)
    model = peft.get_peft_model(One(nn.Linear(24, 16)), variant_config(name))
    for key, parameter in model.named_parameters():
        if "lora_A" in key or "lora_B" in key or "lora_diag" in key:
            nn.init.normal_(parameter.data, std=0.3)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_keep_working_and_plain_ones_are_ours(name, monkeypatch):
    theirs, ours, wide = (variant_model(name) for _ in range(3))
    wide.double()
    report = lk.accelerate(ours)
    assert report.replaced
    assert ("in training" in str(report)) is (name in ("monteclora", "velora"))
    x = torch.randn(3, 5, 24)
    for model in (theirs, ours, wide):
        model.eval()
    with torch.no_grad():
        expected, y = wide(x.double()), theirs(x)
        calls, forward = [], peft_layer.Linear.forward
        monkeypatch.setattr(peft_layer.Linear, "forward", lambda s, *a, **k: (calls.append(s), forward(s, *a, **k))[1])
        within_budget(ours(x), y, expected, ulps=2)
        assert not calls
    grads = []
    for model in (theirs, ours):
        torch.manual_seed(4)
        model.train()(x).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max() + 1))
    for model in (theirs, ours, wide):
        model.eval()
        model.merge_adapter()
    with torch.no_grad():
        within_budget(ours(x), theirs(x), wide(x.double()), ulps=4)
    for model in (theirs, ours):
        model.unmerge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("base_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_on_b(dtype, base_bias, monkeypatch):
    """Alone, beside another adapter, and with one adapter a row."""
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["part"], lora_bias=True, init_lora_weights=False)
    theirs = peft.get_peft_model(One(nn.Linear(24, 16, bias=base_bias)).to(dtype), config, "a")
    theirs.add_adapter("b", peft.LoraConfig(r=2, target_modules=["part"], lora_bias=True, init_lora_weights=False))
    theirs.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["part"], init_lora_weights=False))
    for name, parameter in theirs.named_parameters():
        if name.endswith("lora_B.a.bias") or name.endswith("lora_B.b.bias"):
            nn.init.normal_(parameter.data)
    ours, wide = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    assert lk.accelerate(ours).replaced
    calls, forward = [], peft_layer.Linear.forward
    monkeypatch.setattr(peft_layer.Linear, "forward", lambda s, *a, **k: (calls.append(s), forward(s, *a, **k))[1])
    x = torch.randn(4, 5, 24).to(dtype)
    for chosen in ("a", ["a", "b"], ["plain", "b"]):
        results = []
        for model in (theirs, ours, wide):
            model.base_model.set_adapter(chosen)
            model.train().zero_grad()
            y = model(x.to(model.base_model.model.part.weight.dtype))
            y.double().square().sum().backward()
            results.append((y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        (expected, grads), (got, our_grads), (exact, exact_grads) = results
        within_budget(got, expected, exact, ulps=2)
        assert our_grads.keys() == grads.keys()
        assert any(key.endswith("bias") for key in grads)
        for key, grad in exact_grads.items():
            allowed = (grads[key].double() - grad).norm() + grad.norm() * (0.01 if dtype == torch.bfloat16 else 1e-6)
            assert (our_grads[key].double() - grad).norm() <= allowed, key
    names = ["a", "__base__", "plain", "b"]
    with torch.no_grad():
        results = [
            model.eval()(x.to(model.base_model.model.part.weight.dtype), adapter_names=names)
            for model in (theirs, ours, wide)
        ]
    within_budget(results[1], results[0], results[2], ulps=2)
    assert len(calls) == 4 * 2
    assert not any(isinstance(layer, type(ours.base_model.model.part)) for layer in calls)


# Ways to start an adapter that leave a plain one.


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def started(init, monkeypatch):
    torch.manual_seed(3)
    net, x = Two(), torch.randn(6, 9, 24)
    values = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], "init_lora_weights": init}
    if init == "eva":
        config = peft.LoraConfig(**values, eva_config=peft.EvaConfig(rho=1.0))
        model = peft.get_peft_model(net, config)
        peft.initialize_lora_eva_weights(
            model, [x, x + 1], forward_fn=lambda model, x: model(x), prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None, show_progress_bar=False,
        )  # fmt: skip
        return model
    if init == "corda":
        if importlib.util.find_spec("attr") is None:  # peft asks for its dataclass and does not require it
            monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        config = peft.LoraConfig(**values, corda_config=CordaConfig(corda_method="kpm"))
        preprocess_corda(net, config, run_model=lambda: net(x.flatten(0, 1)))
    else:
        from peft.tuners.lora.config import LoraGAConfig
        from peft.tuners.lora.loraga import preprocess_loraga

        config = peft.LoraConfig(**values, lora_ga_config=LoraGAConfig())
        preprocess_loraga(net, config, train_step=lambda: net(x).square().sum().backward())
    return peft.get_peft_model(net, config)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_an_adapter_started_from_data_is_a_plain_one(init, monkeypatch):
    theirs = started(init, monkeypatch)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    ours, wide = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    assert len(lk.accelerate(ours).replaced) == 2
    x = torch.randn(3, 24)
    with torch.no_grad():
        expected, exact = theirs(x), wide(x.double())
        monkeypatch.setattr(peft_layer.Linear, "forward", None)
        within_budget(ours(x), expected, exact, ulps=2)


def test_replicated_layers_are_ours(monkeypatch):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0))
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], layer_replication=[[0, 2], [1, 2]], init_lora_weights=False
    )
    theirs = peft.get_peft_model(base, config).eval()
    ours, wide = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    assert len(lk.accelerate(ours).replaced) == 6
    ids = torch.randint(1, 50, (2, 5))
    with torch.no_grad():
        expected, exact = theirs(ids).logits, wide(ids).logits
        monkeypatch.setattr(peft_layer.Linear, "forward", None)
        got = ours(ids).logits
    assert (got - exact).norm() <= 2 * (expected - exact).norm() + 2**-23 * exact.norm()


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_an_untrained_adapter_gives_the_bits_of_the_base(config):
    torch.manual_seed(5)
    net, x = One(nn.Linear(700, 300)), torch.randn(9, 700)
    expected = net(x)
    model = peft.get_peft_model(net, peft.LoraConfig(r=5, target_modules=["part"], **config))
    lk.accelerate(model)
    assert layers(model, OurLinear)
    assert torch.equal(model(x), expected)
    x.requires_grad_()
    model(x).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
