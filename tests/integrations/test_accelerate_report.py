"""``accelerate``: what it replaces, what it leaves and says, and what it measures."""

import warnings

import pytest
import torch
from accelerate_cases import Net, OurLinear, PeftLinear, batch, fill, layers, made, pair, paths, peft, same
from peft.tuners.lora.layer import LoraVariant
from torch import nn

import lora_kernels as lk
from lora_kernels.integrations import measure


class Doubled(LoraVariant):
    """A variant that nobody knows."""

    @staticmethod
    def forward(module, active_adapter, x, result, **kwargs):
        update = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        return result + 2 * module.scaling[active_adapter] * update


def test_unknown_variants_are_left():
    model = made(targets=("up", "up2"))
    for layer in layers(model):
        layer.lora_variant["default"] = Doubled()
    expected = model(batch())
    report = lk.accelerate(model)
    assert not report.replaced
    assert report.left == dict.fromkeys(["base_model.model.up", "base_model.model.up2"], "variant Doubled")
    torch.testing.assert_close(model(batch()), expected, rtol=0, atol=0)


def test_unusual_parts_run_peft(monkeypatch):
    theirs, ours = pair()
    for model in (theirs, ours):
        net = model.base_model.model
        net.up.lora_dropout["default"] = nn.AlphaDropout(0.1)
        net.down.lora_A["default"].bias = nn.Parameter(torch.ones(5))
        torch.nn.utils.parametrizations.weight_norm(net.up2.lora_B["default"])
    calls = paths(monkeypatch)
    same(ours.eval()(batch()), theirs.eval()(batch()))
    assert len(calls) == 6
    report = str(lk.accelerate(ours))
    assert "AlphaDropout" in report
    assert lk.restore(ours) == 3


def test_mixed_adapters_on_one_layer_are_remarked():
    model = made("a", "b")
    model.base_model.model.up.lora_variant["b"] = Doubled()
    report = lk.accelerate(model)
    assert len(report.replaced) == 3
    assert "PEFT's own forward for b: variant Doubled" in str(report)


def test_other_tuners_and_mixed_models_are_left():
    loha = peft.get_peft_model(Net(), peft.LoHaConfig(r=2, target_modules=["up"], init_weights=False))
    report = lk.accelerate(loha)
    assert list(report.left.values()) == ["another method than LoRA"]
    assert not report.replaced

    mixed = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["up", "down"]), "a", mixed=True)
    mixed.add_adapter("b", peft.LoHaConfig(r=2, target_modules=["up"]))
    fill(mixed).set_adapter(["a", "b"])
    expected = mixed(batch())
    report = lk.accelerate(mixed)
    assert not report.replaced
    assert "part of a PeftMixedModel" in str(report)
    torch.testing.assert_close(mixed(batch()), expected, rtol=0, atol=0)

    two = peft.get_peft_model(Net(), peft.IA3Config(target_modules=["up"], feedforward_modules=["up"]))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["down"]), fill(two).base_model.model, "lora")
    expected = fill(two)(batch())
    report = lk.accelerate(two)
    assert len(report.replaced) == len(report.left) == 1
    same(two(batch()), expected)


def test_functional_transforms_and_subclasses_run_peft(monkeypatch):
    theirs, ours = pair()
    x = batch(rows=(6,))
    per_row = torch.func.vmap(lambda row: ours(row))
    calls = paths(monkeypatch)
    same(per_row(x), theirs(x))
    assert len(calls) == 6


# Reports and measurements


def test_report_text():
    report = lk.accelerate(made(targets=("up", "down", "up2")))
    text = str(report)
    assert text.startswith("accelerate: 3 layers replaced, 0 left")
    assert "2 x lora.Linear 24 -> 40, r = 5, float32 (base_model.model.up, ...)" in text
    assert "1 x lora.Linear 40 -> 24" in text
    assert "sample=batch" in text


@pytest.mark.parametrize("sample", [batch(), (batch(),), {"x": batch()}])
def test_sample_measures_and_puts_back_what_is_slower(sample, monkeypatch):
    clock = [0.0]  # only forwards take time: ours 2 to 7 ms a layer, PEFT's 5 ms
    ours, theirs = OurLinear.forward, PeftLinear.forward

    def takes(forward, milliseconds):
        def timed(self, x):
            clock[0] += milliseconds(self) / 1e3
            return forward(self, x)

        return timed

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(OurLinear, "forward", takes(ours, lambda layer: 7 if layer.in_features == 24 else 2))
    monkeypatch.setattr(PeftLinear, "forward", takes(theirs, lambda layer: 5))
    model = made(lora_dropout=0.1)
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_hook(lambda m, *_: m.calls.add_(1))
    state = torch.get_rng_state()
    report = lk.accelerate(model, sample=sample)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers(model))
    assert report.replaced == ["base_model.model.down"]
    assert report.left == {f"base_model.model.{name}": "not faster on this sample" for name in ("up", "up2")}
    assert "; 10.000 ms with peft, 14.000 ms with ours: not faster on this sample" in str(report)
    assert "; 5.000 ms with peft, 2.000 ms with ours (base_model.model.down)" in str(report)
    assert type(model.base_model.model.up) is PeftLinear
    assert type(model.base_model.model.down) is OurLinear


def test_sample_on_real_time():
    model = made()
    report = lk.accelerate(model.eval(), sample=batch())
    assert all(group.our_ms > 0 and group.peft_ms > 0 for group in report.groups)
    assert len(layers(model, OurLinear)) == len(report.replaced)


def test_failing_sample_leaves_the_model_as_it_was():
    model = made()
    with pytest.raises(RuntimeError):
        lk.accelerate(model, sample=torch.randn(2, 3))
    assert not layers(model, OurLinear)
    assert not any(layer._forward_hooks for layer in layers(model))


def test_bad_models_are_refused():
    for call in (lk.accelerate, lk.restore):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
            call("model")
    with pytest.raises(ValueError, match="no layer of peft"):
        lk.accelerate(Net())


def test_transformers_add_adapter_and_generate():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]), "one")
    fill(model)
    ids = torch.randint(1, 50, (2, 5))
    expected, text = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    assert len(lk.accelerate(model).replaced) == 6
    same(model(ids).logits, expected)
    torch.testing.assert_close(model.generate(ids, max_new_tokens=5, do_sample=False), text, rtol=0, atol=0)
    model.disable_adapters()
    base = model(ids).logits
    assert not torch.allclose(base, expected)
    model.enable_adapters()
    same(model(ids).logits, expected)
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
