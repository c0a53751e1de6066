"""An adapter in another rank: ``convert_to_lora`` and ``save_as_lora``, beside PEFT's."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_kernels as lk

from .models import randomize

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


class Model(nn.Module):
    def __init__(self, **more):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(12, 20), nn.Linear(20, 9, bias=False), nn.Linear(9, 4)
        self.more = nn.ModuleDict(more)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def pair(**values):
    """The same adapter in ours and in PEFT's model."""
    config = {"target_modules": ["first", "second"], "r": 6, "lora_alpha": 9, "init_lora_weights": False, **values}
    ours = randomize(lk.get_peft_model(Model(), lk.LoraConfig(**copy.deepcopy(config))), 3)
    theirs = peft.get_peft_model(Model(), peft.LoraConfig(**copy.deepcopy(config)))
    peft.set_peft_model_state_dict(theirs, lk.get_peft_model_state_dict(ours))
    return ours, theirs


def deltas(tensors):
    keys = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {k: tensors[f"{k}.lora_B.weight"].double() @ tensors[f"{k}.lora_A.weight"].double() for k in keys}


@pytest.mark.parametrize("rank", [1, 4, 6, 9, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"second": 2}},
        {"target_modules": "(first|second)", "modules_to_save": ["head"]},
    ],
)
def test_updates_configs_and_keys_are_those_of_peft(rank, values):
    ours, theirs = pair(**values)
    assert ours.supports_lora_conversion() is theirs.supports_lora_conversion() is True
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    (config, tensors), (expected, reference) = lk.convert_to_lora(ours, rank), peft.convert_to_lora(theirs, rank)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in reference.items()}
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform"):
        assert (getattr(config, name) or None) == (getattr(expected, name) or None), name
    exact = deltas(lk.get_peft_model_state_dict(ours))
    mine, other = deltas(tensors), deltas(reference)
    for key, delta in exact.items():
        layer = ours.get_submodule(key)
        delta = delta * layer.scaling["default"]
        u, s, vh = torch.linalg.svd(delta)
        kept = len(tensors[f"{key}.lora_A.weight"])
        best = (u[:, :kept] * s[:kept]) @ vh[:kept] if kept <= len(s) else delta
        budget = (other[key] - best).norm() + 16 * torch.finfo(torch.float32).eps * delta.norm()
        assert (mine[key] - best).norm() <= budget
    loaded = lk.get_peft_model(Model(), config)
    assert lk.set_peft_model_state_dict(loaded, tensors, strict=True) == ([], [])
    assert peft.set_peft_model_state_dict(peft.get_peft_model(Model(), expected), tensors).unexpected_keys == []


def test_the_saved_adapter_computes_the_same_at_a_sufficient_rank(tmp_path):
    ours, _ = pair(modules_to_save=["head"])
    ours.add_adapter("other", lk.LoraConfig(r=3, target_modules=["first"], init_lora_weights=False))
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    for name, rank in (("default", 6), ("other", 4)):
        ours.set_adapter(name)
        folder = tmp_path / name
        lk.save_as_lora(folder, ours, rank, name)
        for package in (lk, peft):
            loaded = package.PeftModel.from_pretrained(Model(), folder)
            torch.testing.assert_close(loaded(x), ours(x), rtol=1e-5, atol=1e-5)
        assert all(v.dtype is torch.float32 for v in load_file(folder / "adapter_model.safetensors").values())


def test_an_untrained_adapter_and_layers_without_a_model(capsys):
    config = lk.LoraConfig(target_modules=["first"], r=4)
    plain = lk.inject_adapter_in_model(config, Model())
    del plain.peft_config
    for rank, size in ((2, 2), (0.5, 1)):
        made, tensors = lk.convert_to_lora(plain, rank, progressbar=True)
        assert "Converting to LoRA" in capsys.readouterr().err
        assert made.target_modules == {"first"}
        assert tensors["first.lora_A.weight"].shape == (size, 12)
        assert not tensors["first.lora_B.weight"].any()


@pytest.mark.parametrize(
    ("change", "rank", "error", "message"),
    [
        ({}, 1.5, ValueError, r"It must be between 0 and 1 but got 1\.5"),
        ({}, 0, ValueError, "Passing a rank of 0 doesn't make sense"),
        ({}, 13, ValueError, r"The chosen rank 13 is larger than the weight shape \(12\), please choose a lower rank"),
        ({"bias": "all"}, 2, ValueError, "The adapter's config sets bias=all"),
        ({"target_modules": ["conv"]}, 2, TypeError, "Some module types on this model do not support LoRA conversion"),
        ({"trainable_token_indices": {"emb": [1]}}, 2, TypeError, "Some module types on this model do not support"),
    ],
)
def test_errors_are_those_of_peft(change, rank, error, message):
    for package in (peft, lk):
        more = {"conv": nn.Conv1d(3, 3, 1), "emb": nn.Embedding(5, 3)}
        config = package.LoraConfig(**{"target_modules": ["first"], **change})
        model = package.get_peft_model(Model(**more), config)
        with pytest.raises(error, match=message):
            package.convert_to_lora(model, rank)
        assert model.supports_lora_conversion() is (error is ValueError)
        with pytest.raises(TypeError, match="Could not detect any layer that supports LoRA conversion"):
            package.convert_to_lora(Model(), 2)


def test_dora_and_biases_are_refused_where_peft_drops_them():
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    for values, error in (({"use_dora": True}, TypeError), ({"lora_bias": True}, ValueError)):
        ours, theirs = pair(target_modules=["first"], **values)
        config, tensors = peft.convert_to_lora(theirs, 6)
        lost = peft.get_peft_model(Model(), config)
        peft.set_peft_model_state_dict(lost, tensors)
        assert (lost(x) - theirs(x)).norm() / theirs(x).norm() > 0.05
        with pytest.raises(error, match=r"LoRA conversion|lora_bias"):
            lk.convert_to_lora(ours, 6)
