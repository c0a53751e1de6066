"""``target_parameters`` on transformers' fused experts, against ``peft``: every way to run them."""

import copy
import warnings

import pytest
import torch

import lora_kernels as lk
from lora_kernels.layers import LoraParameter, low_rank, parameter
from lora_kernels.testing import assert_within_budget

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, **ROUTED)),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(**SMALL, **ROUTED, head_dim=16)),
    "llama4": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **SMALL, num_local_experts=4, num_experts_per_tok=1, head_dim=16, intermediate_size_mlp=24
        )
    ),
}
RUNS = [(name, how) for name in MODELS for how in ("eager", "batched_mm", "grouped_mm")]
RUNS = [(name, how) for name, how in RUNS if name != "llama4" or how == "eager"]
BOTH = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": [], "r": 4}


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(parameter, "SMALL", 0)


def make(name, how="eager"):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS[name]()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.1)
    if name != "llama4":
        model.set_experts_implementation(how)
    return model


def pair(name, how="eager", **config):
    """Ours and peft's, with equal tensors that are not zero."""
    models = []
    for package in (lk, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = package.get_peft_model(make(name, how), package.LoraConfig(**{**BOTH, **config}))
        models.append(model.eval())
    ours, theirs = models
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, weight in sorted(theirs.named_parameters()):
            if "lora_" in key:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def ids():
    return torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def close(ours, theirs):
    """Float32 of one formula in two orders of summing."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "how"), RUNS)
def test_outputs_and_gradients(name, how, monkeypatch):
    ours, theirs = pair(name, how)
    built = []
    monkeypatch.setattr(low_rank, "whole", lambda *args: built.append(args))
    with torch.no_grad():
        y = ours(ids()).logits
    close(y, theirs(ids()).logits)
    with ours.disable_adapter(), torch.no_grad():
        assert (ours(ids()).logits - y).abs().max() > 100 * 1e-5
    for model in (ours, theirs):
        model.train()
        model(ids(), labels=ids()).loss.backward()
    found = {key: weight.grad for key, weight in ours.named_parameters() if weight.grad is not None}
    expected = {key: weight.grad for key, weight in theirs.named_parameters() if weight.grad is not None}
    assert list(found) == list(expected)
    assert len(found) == 8
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-6)
    assert not built


@pytest.mark.parametrize("name", MODELS)
def test_life(name, tmp_path):
    ours, theirs = pair(name, target_modules=["q_proj"])
    kinds = [type(layer).__name__ for layer in ours.base_model.lora_layers()]
    assert kinds.count("LoraParameter") == 4
    assert sorted(s.name for s in ours.get_layer_status()) == sorted(s.name for s in theirs.get_layer_status())
    assert vars(ours.get_model_status()) == vars(theirs.get_model_status())
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(ours.generate(ids(), **options), theirs.generate(ids(), **options))
    y = theirs(ids()).logits
    for package, model, other in ((lk, ours, peft), (peft, theirs, lk)):
        model.save_pretrained(tmp_path / package.__name__)
        loaded = other.PeftModel.from_pretrained(make(name), str(tmp_path / package.__name__)).eval()
        close(loaded(ids()).logits, y)
    merged = ours.merge_and_unload()
    assert not any(isinstance(module, LoraParameter) for module in merged.modules())
    close(merged(ids()).logits, y)
    close(theirs.merge_and_unload().get_parameter(last := _stack(merged)), merged.get_parameter(last))


def _stack(model):
    return next(key for key, _ in model.named_parameters() if key.endswith("experts.down_proj"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_activation_checkpoints(reentrant):
    plain, _ = pair("mixtral", "grouped_mm")
    ours, _ = pair("mixtral", "grouped_mm")
    ours.prepare_model_for_gradient_checkpointing(ours)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, ours):
        model.train()
        model(ids(), labels=ids()).loss.backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameter_name", BOTH["target_parameters"])
@pytest.mark.parametrize(("name", "how"), RUNS)
def test_half_precision(name, how, dtype, parameter_name):
    ours, theirs = (_experts(model) for model in pair(name, how, target_parameters=[parameter_name]))
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(12, 32, generator=generator)]
    if name != "llama4":
        weights = torch.rand(12, 2, generator=generator)
        inputs += [torch.rand(12, 4, generator=generator).topk(2).indices, weights]
    for experts in (ours, theirs):
        for key, weight in experts.named_parameters():
            weight.data = weight.data.to(torch.float32 if "lora_" in key else dtype)
    half = [value.to(dtype) if value.is_floating_point() else value for value in inputs]
    double = [value.double() if value.is_floating_point() else value for value in half]
    exact = copy.deepcopy(theirs).double()
    exact.get_base_layer().config = transformers.MixtralConfig(experts_implementation="eager")
    exact = exact(*double)
    y, z = ours(*half), theirs(*half)
    assert_within_budget(y, z, exact, "experts", magnitude=exact.abs())


def _experts(model):
    return next(module for path, module in model.named_modules() if path.endswith("experts"))


def test_accelerated():
    _, theirs = pair("mixtral", "grouped_mm", target_modules=["q_proj"])
    y = theirs(ids()).logits
    report = lk.accelerate(theirs, sample=ids())
    assert len(report.replaced) + len(report.left) == 6
    close(theirs(ids()).logits, y)
    lk.restore(theirs)
    close(theirs(ids()).logits, y)
