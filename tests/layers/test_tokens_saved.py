"""Trainable tokens: what is refused before anything changes, and what is in files, against peft."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_kernels as lk

from .lm import VOCABULARY, ids
from .oracle import close
from .test_tokens import fresh, pair, randomize

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"modules_to_save": ["embed_tokens"]}, ValueError, "already marked to be trained fully"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, TypeError, "cannot be applied to modules of type"),
        ({"trainable_token_indices": {"nowhere": [1]}}, ValueError, "Target modules {'nowhere'} not found"),
        ({"trainable_token_indices": {"model": [1]}}, TypeError, "cannot be applied to modules of type"),
        ({"trainable_token_indices": [1, VOCABULARY]}, (ValueError, IndexError), ""),
    ],
)
def test_what_peft_refuses_is_refused_before_anything_changes(config, error, message):
    for library in (lk, peft):
        model, values = fresh(), {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1]}}
        before = [(n, type(m)) for n, m in model.named_modules()]
        if library is peft and "model" in str(config):
            continue  # peft fails in a forward
        with pytest.raises(error, match=message):
            library.get_peft_model(model, library.LoraConfig(**{**values, **config}))
        if library is lk:
            assert [(n, type(m)) for n, m in model.named_modules()] == before


def test_a_second_adapter_that_does_not_fit_is_refused_and_leaves_no_trace():
    model = lk.get_peft_model(fresh(True), lk.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]))
    before = list(model.state_dict())
    for values in (
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
    ):
        with pytest.raises(ValueError, match="trainable_token_indices"):
            model.add_adapter("b", lk.LoraConfig(**{"target_modules": ["q_proj"], **values}))
        assert list(model.state_dict()) == before
        assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_damaged_rows_are_named_and_the_model_is_untouched(damage, tmp_path):
    from safetensors.torch import save_file

    ours, _ = pair([1, 3])
    ours.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = tensors.pop(key)
    damaged = {"missing": {}, "shape": {key: torch.cat([rows, rows])}, "nan": {key: rows * float("nan")}}[damage]
    save_file({**tensors, **damaged}, path)
    model = fresh()
    with pytest.raises(ValueError, match="trainable_tokens_delta"):
        lk.PeftModel.from_pretrained(model, str(tmp_path))
    assert type(model.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize("how", ["auto", True, False])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_which_embedding_weights_are_saved(how, targets):
    ours, theirs = pair({"embed_tokens": [1, 3]}, target_modules=targets)
    a = lk.get_peft_model_state_dict(ours, save_embedding_layers=how)
    b = peft.get_peft_model_state_dict(theirs, save_embedding_layers=how)
    assert sorted(a) == sorted(b)


def test_a_resized_vocabulary_is_saved_and_loaded_both_ways(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}

    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=12, **size)).save_pretrained(tmp_path / "base")
    for library, other in ((lk, peft), (peft, lk)):
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(VOCABULARY)
        config = library.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 12])
        model = randomize(library.get_peft_model(model, config)).eval()
        model.save_pretrained(tmp_path / library.__name__)
        saved = load_file(tmp_path / library.__name__ / "adapter_model.safetensors")
        assert "base_model.model.model.embed_tokens.token_adapter.base_layer.weight" in saved
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        again.resize_token_embeddings(VOCABULARY)
        loaded = other.PeftModel.from_pretrained(again, str(tmp_path / library.__name__)).eval()
        torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits)


def test_rows_on_the_meta_device_until_they_are_loaded():
    config, tensors = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}, None
    for library in (peft, lk):
        full = randomize(library.get_peft_model(fresh(True), library.LoraConfig(**config))).eval()
        tensors = tensors or peft.get_peft_model_state_dict(full)
        empty = library.get_peft_model(fresh(True), library.LoraConfig(**config), low_cpu_mem_usage=True).eval()
        assert [n for n, p in empty.named_parameters() if p.is_meta] == [
            n for n, p in full.named_parameters() if p.requires_grad
        ]
        library.set_peft_model_state_dict(empty, tensors, low_cpu_mem_usage=True)
        close(empty(ids()), full(ids()).double())
