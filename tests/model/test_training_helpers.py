"""What scripts call around training: LoRA+'s optimizer, quantised models made ready, signatures; beside PEFT."""

import importlib
import inspect
import sys
import types

import pytest
import torch
from torch import nn

import lora_kernels as lk

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = (peft, lk)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(30, 12), nn.LayerNorm(12)
        self.first, self.head = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.first(self.norm(self.embedding(x)))))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=20))


class AdamW8bit(torch.optim.AdamW):
    """By its name one of bitsandbytes' optimizers."""


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW8bit])
def test_the_groups_of_lora_plus_are_those_of_peft(kind, monkeypatch):
    overrides = []
    manager = types.SimpleNamespace(register_module_override=lambda *given: overrides.append(given[1:]))
    optim = types.ModuleType("bitsandbytes.optim")
    optim.GlobalOptimManager = types.SimpleNamespace(get_instance=lambda: manager)
    fake = types.ModuleType("bitsandbytes")
    fake.optim = optim
    values = {"target_modules": ["embedding", "first"], "modules_to_save": ["norm", "head"], "bias": "all"}
    options = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_lr_embedding": 2e-5, "loraplus_weight_decay": 0.1}
    found, trained = [], []
    for package in BOTH:
        torch.manual_seed(1)
        model = package.get_peft_model(Net(), package.LoraConfig(**values))
        create = importlib.import_module(f"{package.__name__}.optimizers").create_loraplus_optimizer
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "bitsandbytes", fake)
            patch.setitem(sys.modules, "bitsandbytes.optim", optim)
            optimizer = create(model, kind, eps=1e-6, **options)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        rest = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        found.append(([sorted(names[id(p)] for p in g["params"]) for g in optimizer.param_groups], rest))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(torch.arange(12).view(2, 6)).square().sum().backward()
        optimizer.step()
        trained.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
    assert found[1] == found[0]
    assert all(group for group in found[0][0])
    assert trained[1] == trained[0] != set()
    assert len(overrides) % 2 == 0
    assert bool(overrides) is (kind is AdamW8bit)


CHECKPOINTING = [{}, {"use_gradient_checkpointing": False}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}]
BITS = [{}, {"is_loaded_in_8bit": True}, {"is_loaded_in_4bit": True}]
PACKED = [{"quantization_method": "gptq"}, {"hqq_quantized": True}]


@pytest.mark.parametrize("options", CHECKPOINTING)
@pytest.mark.parametrize("mark", BITS + PACKED)
def test_quantised_models_are_made_ready_and_others_only_frozen_and_cast(options, mark):
    found = []
    for package in BOTH:
        model = llama().bfloat16()
        for name, value in mark.items():
            setattr(model, name, value)
        made = package.prepare_model_for_kbit_training(model, **options)
        assert made is model
        hooks = len(model.get_input_embeddings()._forward_hooks)
        dtypes = {p.dtype for p in model.parameters()}
        found.append((model.is_gradient_checkpointing, hooks, dtypes, any(p.requires_grad for p in model.parameters())))
    assert found[1] == found[0]


def test_signatures_are_borrowed_from_the_base_model(monkeypatch):
    found = []
    monkeypatch.setattr(peft.PeftModel, "forward", lambda self, *args, **kwargs: None)  # PEFT writes on the classes
    monkeypatch.setattr(peft.PeftModel, "generate", lambda self, *args, **kwargs: None)
    for package in BOTH:
        update_signature = importlib.import_module(f"{package.__name__}.helpers").update_signature
        model = package.get_peft_model(llama(), package.LoraConfig())
        update_signature(model)
        names = [[*inspect.signature(method).parameters] for method in (model.forward, model.generate)]
        found.append([[name for name in own if name not in ("self", "adapter_names")] for own in names])
        with pytest.raises(ValueError, match="is not supported please choose one of"):
            update_signature(model, "other")
    assert found[1] == found[0]
    ids = torch.arange(6).view(1, -1)
    ours, base = model.eval(), llama().eval()
    options = {"max_new_tokens": 2, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), base.generate(ids, **options))
    other = lk.get_peft_model(Net(), lk.LoraConfig(target_modules=["first"]))
    lk.helpers.update_signature(other)
    assert [*inspect.signature(other.forward).parameters][:1] == ["x"]
    assert "x" not in inspect.signature(ours.forward).parameters


def test_ephemeral_offload_warns_and_changes_no_result():
    """PEFT moves the weights to a GPU to compute norms, and without one it fails."""
    values = {"target_modules": ["first"], "use_dora": True}
    with pytest.warns(UserWarning, match="ephemeral_gpu_offload=True changes nothing"):
        config = lk.LoraConfig(**values, runtime_config=lk.LoraRuntimeConfig(ephemeral_gpu_offload=True))
    x = torch.arange(6)
    outputs = [p.get_peft_model(Net(), c)(x) for p, c in ((lk, config), (peft, peft.LoraConfig(**values)))]
    torch.testing.assert_close(*outputs)
