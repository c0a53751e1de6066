"""Checkpoints as older releases of PEFT and other tools wrote them."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_kernels as lk
from lora_kernels.utils.hotswap import hotswap_adapter

from .models import randomize, tiny, token_ids

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def saved(path, **values):
    """A model of PEFT's, and its checkpoint."""
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "embed"], **values})
    model = randomize(peft.get_peft_model(tiny(), config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.5)
    model.save_pretrained(path, save_embedding_layers=False)
    return model


def rename(path, change):
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    renamed = {change(key): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file)


def fresh():
    return lk.get_peft_model(tiny(), lk.LoraConfig(target_modules=["v_proj"]), "other")


def loaded(path, way):
    if way == "from_pretrained":
        return lk.PeftModel.from_pretrained(tiny(), path).eval()
    model = fresh()
    if way == "load_adapter":
        model.load_adapter(path, "default")
    else:
        model.add_adapter("default", lk.LoraConfig.from_pretrained(path))
        lk.set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
    model.set_adapter("default")
    return model.eval()


WAYS = pytest.mark.parametrize("way", ["from_pretrained", "load_adapter", "set_peft_model_state_dict"])


@WAYS
def test_magnitudes_with_the_name_of_their_parameter(tmp_path, way):
    theirs = saved(tmp_path, use_dora=True)
    rename(tmp_path, lambda key: f"{key}.weight" if key.endswith("magnitude_vector") else key)
    read = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    torch.testing.assert_close(read(token_ids()), theirs(token_ids()))
    model = loaded(tmp_path, way)
    torch.testing.assert_close(model(token_ids()), theirs(token_ids()), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        randomize(model, 5)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(token_ids()), theirs(token_ids()), rtol=1e-4, atol=1e-5)


@WAYS
def test_biases_of_adapted_layers_up_to_0_6_where_peft_drops_them(tmp_path, way):
    theirs = saved(tmp_path, bias="all")
    rename(tmp_path, lambda key: key.replace(".base_layer.bias", ".bias"))
    wanted = theirs(token_ids())
    read = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert (read(token_ids()) - wanted).abs().max() > 0.05
    torch.testing.assert_close(loaded(tmp_path, way)(token_ids()), wanted, rtol=1e-4, atol=1e-5)


def test_a_key_of_today_comes_before_one_of_old(tmp_path):
    theirs = saved(tmp_path, bias="all")
    file = tmp_path / "adapter_model.safetensors"
    old = {k.replace(".base_layer.bias", ".bias"): t + 1 for k, t in load_file(file).items() if "base_layer.bias" in k}
    assert old
    save_file({**old, **load_file(file)}, file)
    model = fresh()
    assert set(model.load_adapter(tmp_path, "default").unexpected_keys) == old.keys()
    model.set_adapter("default")
    torch.testing.assert_close(model.eval()(token_ids()), theirs(token_ids()), rtol=1e-4, atol=1e-5)


def test_an_eva_adapter_is_read_as_the_plain_one_it_is(tmp_path):
    theirs = saved(tmp_path, target_modules=["q_proj"])
    file = tmp_path / "adapter_config.json"
    eva = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **eva}))
    for way in ("from_pretrained", "load_adapter"):
        torch.testing.assert_close(loaded(tmp_path, way)(token_ids()), theirs(token_ids()), rtol=1e-4, atol=1e-5)
    pool = lk.AdapterPool(model := tiny(), num_slots=1, max_rank=4)
    pool.register("eva", tmp_path)
    with torch.inference_mode(), pool.batch(["eva"] * 3):
        torch.testing.assert_close(model(token_ids()), theirs(token_ids()), rtol=1e-4, atol=1e-5)


# What adapter_config.json held when a field first came or for the last time was there.
CONFIGS = {
    "0.1": {"merge_weights": False, "enable_lora": None, "lora_dropout": 0.05},
    "0.3": {"init_lora_weights": True, "lora_dropout": 0.05},
    "0.7": {"rank_pattern": {}, "alpha_pattern": {}, "megatron_config": None, "loftq_config": {}, "revision": None},
    "0.12": {"layer_replication": None, "rank_pattern": None, "alpha_pattern": None, "loftq_config": None},
    "0.13": {"runtime_config": {"ephemeral_gpu_offload": False}, "megatron_core": "megatron.core"},
    "0.18": {"corda_config": None, "use_qalora": False, "qalora_group_size": 16, "arrow_config": None},
}


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
@pytest.mark.parametrize("release", CONFIGS)
def test_configs_and_pickles_of_older_releases(tmp_path, release, legacy):
    theirs = saved(tmp_path, modules_to_save=["head"])
    known = {"bias": "none", "fan_in_fan_out": False, "inference_mode": True, "task_type": None, "lora_alpha": 8}
    known |= {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "embed"], "modules_to_save": ["head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**known, **CONFIGS[release]}))
    file = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=not legacy)
    file.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = loaded(tmp_path, "from_pretrained")
    torch.testing.assert_close(model(token_ids()), theirs(token_ids()), rtol=1e-4, atol=1e-5)
