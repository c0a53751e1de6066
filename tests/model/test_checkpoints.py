"""Adapters on disk: PEFT reads ours, we read PEFT's, and a file that is not one changes nothing."""

import copy
import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels.config import LoraConfig
from lora_kernels.io.checkpoint import CheckpointError
from lora_kernels.io.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from lora_kernels.model import PeftModel, get_peft_model

from .models import randomize, tiny, token_ids

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = {
    "linear": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6},
    "embedding": {"target_modules": ["embed", "q_proj"], "r": 4},
    "rslora": {"target_modules": ["q_proj"], "r": 4, "use_rslora": True},
    "patterns": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q": 5}},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["head", "norm"]},
    "bias_all": {"target_modules": ["q_proj"], "bias": "all"},
    "bias_lora_only": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "all_linear": {"target_modules": "all-linear", "r": 2, "lora_dropout": 0.2},
    "regex": {"target_modules": r".*\.0\.[qv]_proj", "r": 3},
    "bias_and_saved": {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["head"]},
}


def trained(package, values, dtype=torch.float32):
    """A model with an adapter whose every tensor is random, biases too."""
    wrap = package.get_peft_model if package is peft else get_peft_model
    config = package.LoraConfig(**values) if package is peft else LoraConfig(**values)
    model = randomize(wrap(tiny(dtype=dtype), config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.normal_()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_peft_reads_ours(tmp_path, case, dtype):
    ours = trained(None, CASES[case], dtype)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(dtype=dtype), tmp_path)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(theirs(token_ids()), ours(token_ids()), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_we_read_what_peft_writes(tmp_path, case, dtype):
    theirs = trained(peft, CASES[case], dtype)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(tiny(dtype=dtype), tmp_path)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(ours(token_ids()), theirs(token_ids()), **tolerance)
    assert not any(p.requires_grad for n, p in ours.named_parameters() if "lora_" in n)
    assert not ours.training


@pytest.mark.parametrize("case", CASES)
def test_files_hold_the_keys_of_peft(tmp_path, case):
    trained(None, CASES[case]).save_pretrained(tmp_path / "a")
    trained(peft, CASES[case]).save_pretrained(tmp_path / "b")
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in "ab")
    stray = {k for k in b if ".modules_to_save." in k}  # PEFT saves the bias of its copy twice
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {
        k: (v.shape, v.dtype) for k, v in b.items() if k not in stray
    }
    a, b = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in "ab")
    for config in (a, b):
        config["target_modules"] = sorted(config["target_modules"])
        config.pop("peft_version")
    assert a == b
    assert sorted(os.listdir(tmp_path / "a")) == sorted(os.listdir(tmp_path / "b"))


@pytest.mark.parametrize("case", CASES)
def test_module_tree_state_dict_and_initial_values_are_those_of_peft(case):
    torch.manual_seed(7)
    ours = get_peft_model(tiny(), LoraConfig(**CASES[case]))
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(**CASES[case]))
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key
    names = [n for n, _ in theirs.named_modules()]
    assert [n for n, _ in ours.named_modules()] == names
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in theirs.named_parameters() if p.requires_grad
    ]
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_several_adapters_each_way(tmp_path):
    ours = trained(None, CASES["linear"])
    ours.add_adapter("b", LoraConfig(**CASES["saved"]))
    randomize(ours, 5).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path / "ours")
    theirs.load_adapter(tmp_path / "ours" / "b", "b")
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(tiny(), tmp_path / "theirs")
    result = again.load_adapter(tmp_path / "theirs" / "b", "b")
    assert result == ([], [])
    assert again.active_adapters == ["default"]
    for name in ("default", "b"):
        for model in (ours, theirs, again):
            model.set_adapter(name)
        torch.testing.assert_close(theirs(token_ids()), ours(token_ids()))
        torch.testing.assert_close(again(token_ids()), ours(token_ids()))
    keys = load_file(tmp_path / "ours" / "b" / "adapter_model.safetensors")
    assert not any("default" in k or "v_proj" in k for k in keys)


def test_pickle_format_is_read_without_running_it(tmp_path):
    theirs = trained(peft, CASES["linear"])
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert "adapter_model.bin" in os.listdir(tmp_path)
    ours = PeftModel.from_pretrained(tiny(), tmp_path)
    torch.testing.assert_close(ours(token_ids()), theirs(token_ids()))


def test_get_and_set_state_dict():
    model = trained(None, CASES["saved"])
    tensors = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    theirs = peft.get_peft_model_state_dict(trained(peft, CASES["saved"]))
    assert set(tensors) == set(theirs)
    other = get_peft_model(tiny(), LoraConfig(**CASES["saved"]))
    result = set_peft_model_state_dict(other, {**tensors, "foreign": torch.zeros(1)})
    assert result.unexpected_keys == ["foreign"]
    torch.testing.assert_close(other(token_ids()), model(token_ids()))
    with pytest.raises(CheckpointError, match="foreign"):
        set_peft_model_state_dict(other, {**tensors, "foreign": torch.zeros(1)}, strict=True)
    with pytest.raises(ValueError, match="no adapter 'x'"):
        get_peft_model_state_dict(model, adapter_name="x")


def test_trainable_load_and_low_memory_creation(tmp_path):
    model = trained(None, CASES["linear"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    assert all(p.requires_grad for n, p in loaded.named_parameters() if "lora_" in n)
    empty = get_peft_model(tiny(), LoraConfig(**CASES["linear"]), low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in empty.named_parameters() if "lora_" in n)
    set_peft_model_state_dict(empty, get_peft_model_state_dict(model))
    torch.testing.assert_close(empty(token_ids()), model(token_ids()))


# Bad files


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE_MARK"],)


def _rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.layers.0.q_proj.lora_A.weight"
DAMAGE = {
    "no_file": (lambda p: p.unlink(), "adapter_model.safetensors"),
    "empty": (lambda p: p.write_bytes(b""), "not a readable"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-50]), "not a readable"),
    "cut_in_header": (lambda p: p.write_bytes(p.read_bytes()[:40]), "not a readable"),
    "huge_header": (lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{}"), "not a readable"),
    "foreign": (lambda p: p.write_bytes(b"PK\x03\x04 not tensors" * 20), "not a readable"),
    "missing_key": (lambda p: _rewrite(p, lambda t: t.pop(KEY)), f"missing {KEY}"),
    "no_prefix": (lambda p: save_file({k[17:]: v for k, v in load_file(p).items()}, p), "missing"),
    "other_rank": (lambda p: _rewrite(p, lambda t: t.update({KEY: torch.zeros(3, 16)})), r"\(4, 16\), got \(3, 16\)"),
    "transposed": (lambda p: _rewrite(p, lambda t: t.update({KEY: torch.zeros(16, 4)})), r"\(4, 16\), got \(16, 4\)"),
    "int": (lambda p: _rewrite(p, lambda t: t.update({KEY: torch.zeros(4, 16, dtype=torch.int8)})), "int8"),
    "nan": (lambda p: _rewrite(p, lambda t: t.update({KEY: torch.full((4, 16), float("nan"))})), "Inf or NaN"),
    "inf": (lambda p: _rewrite(p, lambda t: t.update({KEY: torch.full((4, 16), float("inf"))})), "Inf or NaN"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_named_and_the_model_is_untouched(tmp_path, damage):
    trained(None, CASES["linear"]).save_pretrained(tmp_path)
    function, message = DAMAGE[damage]
    function(tmp_path / "adapter_model.safetensors")
    model = tiny()
    before, flags = list(model.named_modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(model, tmp_path)
    assert list(model.named_modules()) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    wrapped = trained(None, CASES["linear"])
    expected, before = wrapped(token_ids()), list(wrapped.named_modules())
    with pytest.raises(CheckpointError, match=message):
        wrapped.load_adapter(tmp_path, "b")
    assert list(wrapped.named_modules()) == before
    assert list(wrapped.peft_config) == ["default"]
    assert torch.equal(wrapped(token_ids()), expected)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_no_pickle_is_executed(tmp_path, monkeypatch, name):
    trained(None, CASES["linear"]).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    monkeypatch.setenv("HOSTILE_MARK", str(tmp_path / "mark"))
    (tmp_path / name).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match="not a readable"):
        PeftModel.from_pretrained(tiny(), tmp_path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 10**9}, "shape"),
        ({"kasa_config": {"beta": 1.0}}, "KaSA"),
        ({"target_modules": ["nothing"]}, "nothing"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"init_lora_weights": "mica"}, "init_lora_weights"),
    ],
)
def test_configs_that_do_not_fit_are_named(tmp_path, change, message):
    trained(None, CASES["linear"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = tiny()
    before = list(model.named_modules())
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        PeftModel.from_pretrained(model, tmp_path)
    assert list(model.named_modules()) == before


def test_strict_refuses_unknown_keys_and_restores(tmp_path):
    trained(None, CASES["linear"]).save_pretrained(tmp_path)
    _rewrite(tmp_path / "adapter_model.safetensors", lambda t: t.update(stray=torch.zeros(2)))
    wrapped = trained(None, CASES["embedding"])
    assert wrapped.load_adapter(tmp_path, "a").unexpected_keys == ["stray"]
    before = list(wrapped.named_modules())
    with pytest.raises(CheckpointError, match="stray"):
        wrapped.load_adapter(tmp_path, "b", strict=True)
    assert [n for n, _ in wrapped.named_modules()] == [n for n, _ in before]
    model = tiny()
    before = list(model.named_modules())
    with pytest.raises(CheckpointError, match="stray"):
        PeftModel.from_pretrained(model, tmp_path, strict=True)
    assert list(model.named_modules()) == before


@pytest.mark.parametrize("case", ["saved", "bias_all", "bias_and_saved"])
def test_what_is_in_no_layer_is_loaded_into_a_model_on_the_meta_device(tmp_path, case):
    source = trained(None, CASES[case])
    source.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = tiny()
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(model, tmp_path))
    for key, tensor in get_peft_model_state_dict(source).items():
        assert loaded[key].is_meta or torch.equal(loaded[key], tensor)
        assert loaded[key].is_meta == (".q_proj." in key)


def test_a_failed_load_leaves_the_modules_that_were_to_be_replaced(tmp_path):
    trained(None, CASES["saved"]).save_pretrained(tmp_path)
    _rewrite(tmp_path / "adapter_model.safetensors", lambda t: t.update(stray=torch.zeros(2)))
    model = tiny()
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(CheckpointError, match="stray"):
        PeftModel.from_pretrained(model, tmp_path, strict=True)
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == before


# Saving


def _contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("fail_at", ["write", "sync", "replace 1", "replace 2"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_while_saving_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, fail_at, fresh, error):
    target = tmp_path / "checkpoint"
    if not fresh:
        trained(None, CASES["linear"]).save_pretrained(target)
    before = _contents(tmp_path)
    model = trained(None, CASES["rslora"])
    calls = []

    def crash(function, name):
        def wrapper(*args, **kwargs):
            calls.append(name)
            if name == fail_at.split()[0] and calls.count(name) == int((fail_at + " 1").split()[1]):
                if name == "write":
                    with open(args[1], "wb") as file:
                        file.write(b"half")
                raise error
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(os, "replace", crash(os.replace, "replace"))
    monkeypatch.setattr(os, "fsync", crash(os.fsync, "sync"))
    monkeypatch.setattr("lora_kernels.io.checkpoint.save_file", crash(save_file, "write"))
    with pytest.raises(type(error)):
        model.save_pretrained(target)
    assert _contents(tmp_path) == before
    assert target.exists() != fresh
    monkeypatch.undo()
    model.save_pretrained(target)
    torch.testing.assert_close(PeftModel.from_pretrained(tiny(), target)(token_ids()), model(token_ids()))


def test_other_files_in_the_folder_are_kept_and_bad_calls_named(tmp_path):
    model = trained(None, CASES["linear"])
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().endswith("---\nmine")
    assert len(os.listdir(tmp_path)) == 3
    with pytest.raises(ValueError, match="file"):
        model.save_pretrained(tmp_path / "README.md")
    with pytest.raises(ValueError, match="no adapter"):
        model.save_pretrained(tmp_path, selected_adapters=["x"])
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        model.load_adapter(tmp_path / "nowhere", "b")


def test_saving_does_not_change_the_config_or_the_model(tmp_path):
    model = trained(None, CASES["linear"])
    config = copy.deepcopy(model.peft_config["default"])
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"] == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True


def test_shared_tensors_are_saved_as_two(tmp_path):
    model = trained(None, {"target_modules": ["q_proj"], "r": 4})
    layers = model.base_model.lora_layers()
    layers[1].lora_A["default"].weight = layers[0].lora_A["default"].weight
    model.save_pretrained(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "copy")
    torch.testing.assert_close(PeftModel.from_pretrained(tiny(), tmp_path / "copy")(token_ids()), model(token_ids()))
