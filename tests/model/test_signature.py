"""``forward`` of a wrapped model without a task: the arguments of the model below, which ``Trainer`` reads."""

import copy
import inspect
import pickle

import pytest
import torch

import lora_kernels as lk

from .models import randomize, tiny, token_ids


def wrapped():
    return randomize(lk.get_peft_model(tiny(), lk.LoraConfig(target_modules=["q_proj"])).eval())


def test_arguments_are_those_of_the_base_model():
    model = wrapped()
    assert list(inspect.signature(model.forward).parameters) == ["ids", "adapter_names"]
    expected = model(token_ids())
    assert torch.equal(model(ids=token_ids()), expected)
    assert torch.equal(model(token_ids(), adapter_names=["default"] * 3), expected)


def test_copies_call_themselves():
    model = wrapped()
    expected = model(token_ids())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.base_model.model.head.weight.data.zero_()
        assert torch.equal(other(token_ids()), expected)
        model = other


def test_trainer_keeps_the_columns(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model = lk.get_peft_model(model, lk.LoraConfig(target_modules=["q_proj"]))
    samples = [{"input_ids": torch.arange(5), "labels": torch.arange(5), "other": 1} for _ in range(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    before = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.clone()
    transformers.Trainer(model, arguments, train_dataset=samples).train()
    assert not torch.equal(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight, before)
