"""What callers of PEFT's API catch: errors, warnings and files, each against what ``peft`` does."""

import importlib
import re
import warnings

import pytest
import torch
from torch import nn

import lora_kernels as lk

from .models import randomize, tiny, token_ids

peft = pytest.importorskip("peft")
BOTH = pytest.mark.parametrize("package", [peft, lk], ids=["peft", "ours"])


def wrapped(package, seed=0, **config):
    config = {"target_modules": ["q_proj", "v_proj"], "r": 4, **config}
    return randomize(package.get_peft_model(tiny(seed), package.LoraConfig(**config)).eval())


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"bias": "foo"}, NotImplementedError, "Requested bias: foo, is not implemented."),
        ({"init_lora_weights": "orthogonal", "r": 3}, ValueError, "rank to be even, got 3 instead"),
        ({"target_modules": None}, ValueError, "Please specify `target_modules` or `target_parameters`"),
        ({"target_modules": ["zz"]}, ValueError, "not found in the base model"),
        ({"target_modules": ["head"], "exclude_modules": ["head"]}, ValueError, "No modules were targeted for adapt"),
        ({"target_modules": r".*", "exclude_modules": r".*"}, ValueError, "All modules were excluded"),
    ],
)
@BOTH
def test_errors_of_a_first_adapter(package, config, error, message):
    with pytest.raises(error, match=re.escape(message)):
        wrapped(package, **config)


@BOTH
def test_errors_of_further_adapters(package):
    model = wrapped(package, bias="all")
    second = package.LoraConfig(target_modules=["q_proj"], bias="lora_only")
    with pytest.raises(ValueError, match=r"supports only 1 adapter with bias. When using multiple adapters"):
        model.add_adapter("b", second)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")


@BOTH
def test_a_config_of_an_unknown_task(package):
    with pytest.raises(ValueError, match=r"Invalid task type: 'FOO'. Must be one of the following task types: SEQ"):
        package.LoraConfig(task_type="FOO")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"exclude_modules": ["zz"]}, "You have passed exclude_modules="),
        ({"rank_pattern": {"zz": 3}}, "The following rank_pattern keys did not match any targeted module"),
        ({"base_model_name_or_path": "other"}, "The PEFT config's `base_model_name_or_path` was renamed from 'other'"),
        (
            {"init_lora_weights": "pissa", "use_rslora": True, "alpha_pattern": {"q_proj": 3}},
            "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion",
        ),
    ],
)
@BOTH
def test_warnings_of_a_config(package, config, message):
    kind = RuntimeWarning if "rank_pattern" in config else UserWarning
    with pytest.warns(kind, match=re.escape(message)):
        wrapped(package, **config)


@BOTH
def test_merging_what_is_merged_warns_and_changes_nothing(package):
    model = wrapped(package)
    model.add_adapter("b", package.LoraConfig(target_modules=["q_proj"], r=2))
    randomize(model)
    model.merge_adapter(["default"])
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match=r"All adapters are already merged, nothing to do"):
        model.merge_adapter(["default"])
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.warns(UserWarning, match=r"Already following adapters were merged default. You are now additionally"):
        model.merge_adapter(["default", "b"])
    assert model.base_model.model.layers[0].q_proj.merged_adapters == ["default", "b"]


@BOTH
def test_wrapping_a_wrapped_model_warns_and_starts_its_adapter_anew(package):
    model = tiny()
    randomize(package.get_peft_model(model, package.LoraConfig(target_modules=["q_proj"], r=4)))
    with pytest.warns(UserWarning, match=r"You are trying to modify a model with PEFT for a second time"):
        again = package.get_peft_model(model, package.LoraConfig(target_modules=["q_proj"], r=2))
    layer = again.base_model.model.layers[0].q_proj
    assert layer.r == {"default": 2}
    assert not layer.lora_B["default"].weight.any()
    torch.testing.assert_close(again.eval()(token_ids()), tiny().eval()(token_ids()))


@BOTH
@pytest.mark.parametrize("name", ["default", "other"])
def test_loading_into_a_base_that_has_adapters(package, name, tmp_path):
    """One of its name is replaced, another stays and is not active."""
    base = tiny()
    saved = wrapped(package, target_modules=["q_proj", "v_proj"], modules_to_save=["head"])
    saved.save_pretrained(tmp_path)
    old = randomize(package.get_peft_model(base, package.LoraConfig(target_modules=["q_proj"], r=2)))
    kept = old.base_model.model.layers[0].q_proj.lora_A["default"].weight.clone()
    with pytest.warns(UserWarning, match="Already found"):
        loaded = package.PeftModel.from_pretrained(base, tmp_path, name)
    assert loaded.active_adapter == name
    torch.testing.assert_close(loaded.eval()(token_ids()), saved.eval()(token_ids()))
    layer = loaded.base_model.model.layers[0].q_proj
    assert set(layer.r) == {"default", name} == set(loaded.peft_config)
    if name == "other":
        assert torch.equal(layer.lora_A["default"].weight, kept)
    if name == "default" or package is lk:  # PEFT leaves the old one to train, though nothing computes with it
        assert not any(p.requires_grad for p in loaded.parameters())


def test_a_failing_load_into_a_base_that_has_adapters_leaves_them(tmp_path, monkeypatch):
    wrapped(lk).save_pretrained(tmp_path)
    base = tiny()
    old = randomize(lk.get_peft_model(base, lk.LoraConfig(target_modules=["q_proj"], r=2))).eval()
    before = old(token_ids())

    def broken(*args, **kwargs):
        raise OSError("no more")

    monkeypatch.setattr("lora_kernels.stored.set_peft_model_state_dict", broken)
    with pytest.warns(UserWarning, match="Already found"), pytest.raises(OSError, match="no more"):
        lk.PeftModel.from_pretrained(base, tmp_path, "other")
    assert torch.equal(old.eval()(token_ids()), before)
    for layer in old.base_model.lora_layers():
        assert "other" not in layer.r
    assert any(p.requires_grad for p in old.parameters())


@BOTH
def test_the_base_tells_of_its_adapters_until_they_are_unloaded(package):
    base = tiny()
    model = package.get_peft_model(base, package.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.warns(UserWarning, match="for a second time"):
        again = package.get_peft_model(base, package.LoraConfig(target_modules=["v_proj"], r=2), "other")
    assert base.peft_config is model.peft_config is again.peft_config
    assert list(base.peft_config) == ["default", "other"]
    assert not hasattr(again.unload(), "peft_config")


def test_wrapping_a_peft_model_nests_and_both_adapters_take_part():
    outputs = []
    for package in (peft, lk):
        inner = wrapped(package)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = package.LoraConfig(target_modules=["base_model.model.head"], r=2)
            outer = randomize(package.get_peft_model(inner, config)).eval()
        outputs.append(outer(token_ids()))
    torch.testing.assert_close(*outputs)


@BOTH
def test_loading_into_an_adapter_that_is_there_replaces_its_weights(package, tmp_path):
    saved = wrapped(package)
    saved.save_pretrained(tmp_path)
    model = wrapped(package)
    for parameter in model.parameters():
        parameter.data *= 1.5 if parameter.requires_grad else 1.0
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(token_ids()), saved(token_ids()))


def test_pickled_weights_are_read_by_both(tmp_path):
    model = wrapped(lk)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.bin", "README.md"}
    for package in (peft, lk):
        loaded = package.PeftModel.from_pretrained(tiny(), tmp_path)
        torch.testing.assert_close(loaded(token_ids()), model(token_ids()))


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_conversion_to_plain_lora(tmp_path, init, use_rslora):
    for package in (peft, lk):
        config = package.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=init, use_rslora=use_rslora)
        torch.manual_seed(3)
        model = package.get_peft_model(tiny(), config).eval()
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / package.__name__ / "initial")
        model.peft_config["default"].init_lora_weights = init
        for layer in model.base_model.model.layers:
            layer.q_proj.lora_B["default"].weight.data *= 2.0
        before = model.peft_config["default"].to_dict()
        path = tmp_path / package.__name__ / "converted"
        initial = tmp_path / package.__name__ / "initial"
        model.save_pretrained(path, path_initial_model_for_weight_conversion=str(initial))
        assert model.peft_config["default"].to_dict() == before
        for reader in (peft, lk):
            plain = reader.PeftModel.from_pretrained(tiny(), path)
            torch.testing.assert_close(plain(token_ids()), model(token_ids()), rtol=1e-4, atol=1e-5)
            assert (plain.peft_config["default"].r, plain.peft_config["default"].init_lora_weights) == (8, True)


@BOTH
def test_conversion_is_refused_where_the_scaling_is_not_known(package, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = wrapped(package, init_lora_weights="pissa", use_rslora=True, rank_pattern={"q_proj": 2})
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="Passing `path_initial_model_for_weight_conversion` to `save_pretrained`"):
        model.save_pretrained(tmp_path / "b", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))


@BOTH
def test_an_adapter_that_changes_the_base_is_warned_of_beside_others(package, tmp_path):
    wrapped(package, init_lora_weights="olora").save_pretrained(tmp_path)
    model = wrapped(package)
    with pytest.warns(UserWarning, match=r"OLoRA changes the base weights of the model and should thus not be used"):
        model.load_adapter(tmp_path, "b")


@BOTH
def test_model_card(package, tmp_path):
    yaml = pytest.importorskip("yaml")
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- old\n---\nWhat I trained: a 'model'.\n")
    model = tiny()
    model.name_or_path = "some/it's-a-base"
    package.get_peft_model(model, package.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    head, text = (tmp_path / "README.md").read_text().split("---\n", 2)[1:]
    fields = yaml.safe_load(head)
    assert fields["library_name"] == "peft"
    assert fields["license"] == "mit"
    assert {"lora", "base_model:adapter:some/it's-a-base"} <= set(fields["tags"])
    assert "What I trained: a 'model'." in text


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)}) for _ in range(30))


@pytest.mark.parametrize(
    "targets",
    [
        [f"layers.{i}.q" for i in range(30)],
        [f"layers.{i}.q" for i in range(25)],
        [f"layers.{i}.{name}" for i in range(30) for name in "qk"],
        [f"layers.{i}.q" for i in range(5)],
    ],
)
def test_long_lists_of_targets_are_condensed(targets):
    found = []
    for package in (peft, lk):
        model = package.get_peft_model(Deep(), package.LoraConfig(target_modules=targets))
        names = model.targeted_module_names
        found.append((set(model.peft_config["default"].target_modules), sorted(names)))
    assert found[0] == found[1]


@BOTH
def test_rescaling_leaves_the_dict_that_was_there(package):
    helpers = importlib.import_module(f"{package.__name__}.helpers")
    model = wrapped(package, lora_alpha=8)
    layer = model.base_model.model.layers[0].q_proj
    scaling, expected = layer.scaling, model(token_ids())
    with helpers.rescale_adapter_scale(model, 0.5):
        assert (scaling["default"], layer.scaling["default"]) == (2.0, 1.0)
        assert not torch.allclose(model(token_ids()), expected)
    assert layer.scaling == {"default": 2.0}
    torch.testing.assert_close(model(token_ids()), expected)
