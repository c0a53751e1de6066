"""Modules that a model has under several names, and modules inside of others that are adapted, against peft."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_kernels as lk

from .lm import ids
from .oracle import close, gradients, same
from .test_tied import equalize, make, pair


def test_a_module_under_two_names_is_adapted_under_the_first_and_merged_for_it_alone():
    def twice():
        model = make("encoder-decoder", tied=False, says_so=False)
        model.decoder.q_proj = model.encoder.q_proj
        return model

    ours, theirs = pair(twice, target_modules=["q_proj"])
    equalize(ours, theirs)
    same(ours, theirs, (ids(),))
    y, shared = ours(ids()), ours.get_base_model().decoder.q_proj
    assert type(shared) is nn.Linear
    ours.merge_adapter()
    theirs.merge_adapter()
    close(ours(ids()), y.double())
    assert (theirs(ids()) - y).abs().max() > 0.01  # both names have the update
    ours.unmerge_adapter()
    assert ours.get_base_model().encoder.q_proj.base_layer is shared
    assert torch.equal(ours(ids()), y)


def test_a_shared_block_is_adapted_and_merged_once():
    def twice():
        model = make("encoder-decoder", tied=False, says_so=False)
        model.decoder = model.encoder
        return model

    ours, theirs = pair(twice, target_modules=["q_proj", "embed_tokens"])
    equalize(ours, theirs)
    same(ours, theirs, (ids(),))
    gradients(ours, theirs, (ids(),))
    y = ours(ids())
    weight = ours.get_base_model().encoder.q_proj.weight
    for model in (ours, theirs):
        model.merge_adapter()
        close(model(ids()), y.double())
    assert ours.get_base_model().encoder.q_proj.weight is weight
    plain = ours.merge_and_unload()
    assert plain.encoder is plain.decoder
    close(plain(ids()), y.double())


def test_a_module_saved_in_full_under_two_names_has_a_copy_for_each_as_in_peft(tmp_path):
    def twice():
        model = make("encoder-decoder", tied=False, says_so=False)
        model.decoder.embed_tokens = model.encoder.embed_tokens
        return model

    ours, theirs = pair(twice, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    equalize(ours, theirs)
    same(ours, theirs, (ids(),))
    gradients(ours, theirs, (ids(),))
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(twice(), str(tmp_path)).eval()
    close(loaded(ids()), ours(ids()).double())


class Gate(nn.Linear):
    """A linear layer with another inside, which both can be targets."""

    def __init__(self, dim):
        super().__init__(dim, dim)
        self.inner = nn.Linear(dim, dim)

    def forward(self, x):
        return super().forward(x) * torch.sigmoid(self.inner(x))


class Nested(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.gate, self.head = Gate(dim), nn.Sequential(nn.Linear(dim, dim), nn.Linear(dim, 3))

    def forward(self, x):
        return self.head(self.gate(x))


def nested():
    torch.manual_seed(0)
    return Nested()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["gate"]},
        {"target_modules": ["inner"]},
        {"target_modules": ["gate", "0"], "modules_to_save": ["head"]},
        {"target_modules": ["gate", "head.0"], "modules_to_save": ["head.1"]},
    ],
)
def test_targets_that_hold_modules_and_modules_saved_in_full_that_hold_targets(config, tmp_path):
    x = torch.randn(5, 8)
    ours, theirs = pair(nested, **config)
    equalize(ours, theirs)
    same(ours, theirs, (x,))
    gradients(ours, theirs, (x,))
    with ours.disable_adapter(), theirs.disable_adapter():
        same(ours, theirs, (x,), "disabled")
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert sorted(a) == sorted(b)
    loaded = lk.PeftModel.from_pretrained(nested(), str(tmp_path / "theirs")).eval()
    close(loaded(x), ours(x).double())
    for model in (ours, theirs):
        model.merge_adapter()
    same(ours, theirs, (x,), "merged")  # not what it was: this base layer is no linear one
    for model in (ours, theirs):
        model.unmerge_adapter()
    plain = ours.merge_and_unload()
    close(plain(x), theirs.merge_and_unload()(x).double())
    assert not any("Lora" in type(m).__name__ or "Wrapper" in type(m).__name__ for m in plain.modules())


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"target_modules": ["gate", "inner"]}, AttributeError),
        ({"target_modules": ["gate"], "modules_to_save": ["inner"]}, ValueError),
    ],
)
def test_a_module_inside_of_a_target_is_refused_and_named_where_peft_fails_half_way(config, error):
    model = nested()
    before = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(ValueError, match=r"'gate\.inner' is inside of 'gate'"):
        lk.get_peft_model(model, lk.LoraConfig(**config))
    assert [(n, type(m)) for n, m in model.named_modules()] == before
    with pytest.raises(error):
        peft.get_peft_model(model, peft.LoraConfig(**config))
    assert [(n, type(m)) for n, m in model.named_modules()] != before


def test_modules_saved_in_full_one_inside_of_the_other_are_refused():
    with pytest.raises(ValueError, match=r"'head\.1' is inside of 'head'"):
        lk.get_peft_model(nested(), lk.LoraConfig(target_modules=["gate"], modules_to_save=["head", "head.1"]))
