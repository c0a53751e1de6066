"""``inspect``: the numbers are those of the update itself."""

import json

import pytest
import torch
from disk_cases import llama, save_adapter
from safetensors.torch import load_file, save_file

from lora_kernels.__main__ import main


def test_norms_ranks_and_sizes(tmp_path, capsys):
    options = {"r": 4, "lora_alpha": 12, "rank_pattern": {"v_proj": 6}, "use_rslora": True}
    save_adapter(llama, tmp_path, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], **options)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert facts["parameters"] == sum(t.numel() for t in tensors.values())
    assert facts["bytes"] == sum(t.numel() * 4 for t in tensors.values())
    assert facts["ranks"] == [4, 6]
    assert facts["modules"][0]["module"] == "model.layers.0.self_attn.q_proj"
    for module in facts["modules"]:
        key = f"base_model.model.{module['module']}.lora_{{}}.weight"
        a, b = tensors[key.format("A")], tensors[key.format("B")]
        scaling = 12 / (6 if "v_proj" in key else 4) ** 0.5
        assert module["scaling"] == pytest.approx(scaling)
        assert module["update_norm"] == pytest.approx((scaling * b.double() @ a.double()).norm().item(), rel=1e-9)
    assert facts["full_tensors"][0]["tensor"] == "lm_head.weight"
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj" in text
    assert "rsLoRA" in text
    assert main(["inspect", str(tmp_path), "--all"]) == 0
    assert "model.layers.1.self_attn.v_proj" in capsys.readouterr().out


def test_damage_is_shown(tmp_path, capsys):
    save_adapter(llama, tmp_path, target_modules=["q_proj", "v_proj"], r=4)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)][0, 0] = float("nan")
    for key in tensors:
        if "v_proj.lora_B" in key:
            tensors[key] = torch.zeros_like(tensors[key])
    save_file(tensors, path)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "Inf or NaN!" in text
    assert "no update" in text
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "no adapter_config.json" in capsys.readouterr().err
