"""What scripts call around training: LoRA+'s optimizer, quantised models made ready, signatures; beside PEFT."""

import copy
import importlib
import inspect
import sys
import types

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.optimizers import create_lorafa_optimizer

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


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))


PLAIN = {"target_modules": ["embedding", "first"], "modules_to_save": ["head"], "bias": "all"}
FROZEN_A = [
    (PLAIN, torch.float32, 2e-5),
    ({"target_modules": ["first", "head"], "use_rslora": True, "alpha_pattern": {"head": 3}}, torch.float32, 2e-5),
    ({"target_modules": ["first"]}, torch.bfloat16, 2e-2),
]


@pytest.mark.parametrize(("values", "dtype", "near"), FROZEN_A)
def test_lora_fa_takes_the_steps_of_pefts(values, dtype, near):
    values, states, losses = {"r": 4, "lora_alpha": 8, **values}, [], []
    # Ours on PEFT's own model has the same gradients, and has to end with the same bits.
    for package, creator in ((peft, peft), (peft, lk), (lk, lk)):
        torch.manual_seed(1)
        model = package.get_peft_model(Net().to(dtype), package.LoraConfig(**values))
        create = importlib.import_module(f"{creator.__name__}.optimizers").create_lorafa_optimizer
        optimizer = create(model, 4, 8, lr=5e-2, weight_decay=0.1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        x, curve = torch.arange(24).view(4, 6), []
        for _ in range(30):
            loss = (model(x).float() - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        states.append({name: p.detach() for name, p in model.named_parameters()})
        losses.append(torch.tensor(curve))
        assert all(torch.equal(p, before[name]) for name, p in states[-1].items() if "lora_" in name and "_A." in name)
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert all(torch.equal(p, states[1][name]) for name, p in states[0].items())
    torch.testing.assert_close(losses[2], losses[0], rtol=near, atol=near)


@pytest.mark.parametrize("values", [{"use_dora": True}, {"lora_bias": True}, {}])
def test_lora_fa_trains_what_pefts_pairs_wrongly(values):
    """Magnitudes, biases of B and further adapters stand between the A and B that PEFT takes as pairs."""
    model = lk.get_peft_model(Net(), lk.LoraConfig(target_modules=["first"], **values))
    if not values:
        model.add_adapter("other", lk.LoraConfig(target_modules=["first"]))
        model.base_model.set_adapter(["default", "other"])
    optimizer = create_lorafa_optimizer(model, 8, 8, lr=1e-2)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    for _ in range(2):
        model(torch.arange(6)).square().sum().backward()
        optimizer.step()
    assert not any(torch.equal(p, trained[name]) for name, p in model.named_parameters() if name in trained)


def test_lora_fa_of_a_convolution_goes_on_from_its_state():
    def create():
        torch.manual_seed(1)
        model = lk.get_peft_model(conv_net(), lk.LoraConfig(target_modules=["0", "3"], r=2))
        return model, create_lorafa_optimizer(model, 2, 8, lr=1e-2)

    def steps(model, optimizer, count):
        x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(2))
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    (model, optimizer), (again, other) = create(), create()
    steps(model, optimizer, 3)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 3)
    steps(again, other, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_lora_fa_refuses_by_name():
    model = lk.get_peft_model(Net(), lk.LoraConfig(target_modules=["first"]))
    create = create_lorafa_optimizer
    with pytest.raises(ValueError, match="use_rslora: got True"):
        create(model, 8, 8, lr=1e-3, use_rslora=True)
    with pytest.warns(FutureWarning, match="use_rslora"):
        create(model, 8, 8, lr=1e-3, use_rslora=False)
    with pytest.raises(ValueError, match="lr: expected a value of at least 0"):
        create(model, 8, 8, lr=-1.0)
    model.base_model.model.first.scaling["default"] = 0.0
    with pytest.raises(ValueError, match=r"model: expected scalings other than 0.*first"):
        create(model, 8, 8, lr=1e-3)


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
