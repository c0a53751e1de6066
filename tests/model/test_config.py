"""``LoraConfig``: PEFT's fields and file, and no field without effect."""

import dataclasses
import json

import pytest

from lora_kernels.config import LoraConfig, TaskType

peft = pytest.importorskip("peft")


def test_fields_and_defaults_are_those_of_peft():
    ours = {f.name: getattr(LoraConfig(), f.name) for f in dataclasses.fields(LoraConfig)}
    theirs = {f.name: getattr(peft.LoraConfig(), f.name) for f in dataclasses.fields(peft.LoraConfig)}
    assert list(ours) == list(theirs)
    for name in set(ours) - {"peft_version", "runtime_config"}:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"r": 3, "lora_alpha": 7, "target_modules": ["a", "b"], "use_rslora": True, "lora_dropout": 0.1},
        {"target_modules": r".*q_proj", "bias": "all", "modules_to_save": ["head"], "task_type": "CAUSAL_LM"},
        {"target_modules": ["q"], "layers_to_transform": [1, 2], "layers_pattern": "layers", "exclude_modules": ["x"]},
        {"target_modules": [], "target_parameters": ["experts.w2", "experts.w1"], "rank_pattern": {"w1": 2}},
        {"rank_pattern": {"q": 4}, "alpha_pattern": {"q": 8}, "init_lora_weights": "gaussian", "r": 16},
    ],
)
def test_file_is_read_both_ways(tmp_path, values):
    LoraConfig(**values).save_pretrained(tmp_path / "ours")
    theirs = peft.LoraConfig.from_pretrained(tmp_path / "ours")
    peft.LoraConfig(**values).save_pretrained(tmp_path / "theirs")
    ours = LoraConfig.from_pretrained(tmp_path / "theirs")
    a, b = ours.to_dict(), theirs.to_dict()
    assert {k: v for k, v in a.items() if k != "peft_version"} == {k: v for k, v in b.items() if k != "peft_version"}


def test_unknown_fields_warn_and_survive(tmp_path):
    values = {**json.loads(LoraConfig(r=4).to_json()), "field_of_the_future": {"x": [1]}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="field_of_the_future"):
        config = LoraConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["field_of_the_future"] == {"x": [1]}


@pytest.mark.parametrize(
    ("values", "error", "named"),
    [
        ({"r": 0}, ValueError, "r:"),
        ({"r": -3}, ValueError, "r:"),
        ({"r": "8"}, TypeError, "r:"),
        ({"r": True}, TypeError, "r:"),
        ({"lora_alpha": "x"}, TypeError, "lora_alpha"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout"),
        ({"lora_dropout": -0.1}, ValueError, "lora_dropout"),
        ({"task_type": "FOO"}, ValueError, "task type"),
        ({"target_modules": 3}, TypeError, "target_modules"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save"),
        ({"rank_pattern": {"q": 0}}, ValueError, "rank_pattern"),
        ({"alpha_pattern": [1]}, TypeError, "alpha_pattern"),
        ({"use_rslora": "yes"}, TypeError, "use_rslora"),
        ({"target_modules": "q", "layers_to_transform": 1}, ValueError, "layers_to_transform"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, ValueError, "layers_pattern"),
        ({"target_modules": ["q"], "layers_to_transform": "1"}, TypeError, "layers_to_transform"),
        ({"use_dora": True, "lora_bias": True}, ValueError, "DoRA"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, ValueError, "lora_bias"),
        ({"use_qalora": True}, NotImplementedError, "QALoRA.*accelerate. speeds it up$"),
        ({"arrow_config": {"top_k": 1}}, NotImplementedError, "Arrow.*accelerate. speeds it up$"),
        ({"megatron_config": {"hidden_size": 8}}, NotImplementedError, "Megatron.*accelerate. leaves"),
        ({"trainable_token_indices": [1, -1]}, ValueError, "trainable_token_indices"),
        ({"trainable_token_indices": [True]}, ValueError, "trainable_token_indices"),
        ({"trainable_token_indices": []}, ValueError, "trainable_token_indices"),
        ({"trainable_token_indices": {"embed": [1.0]}}, ValueError, "trainable_token_indices"),
        ({"trainable_token_indices": "embed"}, ValueError, "trainable_token_indices"),
        ({"target_parameters": "w"}, TypeError, "target_parameters"),
        ({"target_parameters": [3]}, TypeError, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, NotImplementedError, "layer_replication"),
        ({"init_lora_weights": "lora_ga"}, NotImplementedError, "LoRA-GA.*accelerate"),
        ({"init_lora_weights": "nonsense"}, ValueError, "init_lora_weights"),
        ({"ensure_weight_tying": "yes"}, TypeError, "ensure_weight_tying"),
        ({"alora_invocation_tokens": [1]}, NotImplementedError, "alora_invocation_tokens"),
        ({"kasa_config": {}, "use_qalora": True}, NotImplementedError, "use_qalora"),
    ],
)
def test_bad_values_are_named(values, error, named):
    with pytest.raises(error, match=named):
        LoraConfig(**values)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"peft_type": "LORA", "r": 0}', "[" * 100_000, '{"r": 8}'])
def test_bad_files_are_named(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        LoraConfig.from_pretrained(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        LoraConfig.from_pretrained(tmp_path / "nowhere")


def test_task_type_enum_and_inert_fields():
    assert LoraConfig(task_type=TaskType.SEQ_CLS).to_dict()["task_type"] == "SEQ_CLS"
    with pytest.warns(UserWarning, match="qalora_group_size"):
        LoraConfig(qalora_group_size=32)
