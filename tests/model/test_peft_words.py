"""Small things that PEFT's users and their tests rely on, against PEFT: attributes, warnings, no-ops to the bit."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.helpers import rescale_adapter_scale

peft = pytest.importorskip("peft")
BOTH = pytest.mark.parametrize("package", [peft, lk])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32))


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaling_of_zero_gives_the_bits_of_the_base(rows, dtype):
    base = net().to(dtype)
    x = torch.randn(rows, 64, dtype=dtype)
    want = base(x)
    model = lk.get_peft_model(base, lk.LoraConfig(target_modules=["0", "2"], init_lora_weights=False)).eval()
    assert not torch.equal(model(x), want)
    with rescale_adapter_scale(model, 0.0):
        assert torch.equal(model(x), want)
    for layer in (model.base_model.model[0], model.base_model.model[2]):
        layer.set_scale("default", 0)
    assert torch.equal(model(x), want)
    model.base_model.model[0].set_scale("default", 1)
    assert not torch.equal(model(x), want)
    model.base_model.model[0].scaling = {"default": 0.0}
    assert torch.equal(copy.deepcopy(model)(x), want)


@BOTH
def test_targeted_parameter_names(package):
    model = package.get_peft_model(net(), package.LoraConfig(target_parameters=["0.weight", "2.weight"]))
    assert model.targeted_parameter_names == ["0.weight", "2.weight"]
    assert model.targeted_module_names == []
    model.add_adapter("other", package.LoraConfig(target_parameters=["2.weight", "0.weight"]))
    assert model.targeted_parameter_names == ["0.weight", "2.weight"]


@BOTH
def test_a_name_in_the_prefix_warns(package):
    config = package.LoraConfig(target_modules=["0"])
    with pytest.warns(UserWarning, match="'lora' should not be contained in the prefix 'lora_'"):
        model = package.get_peft_model(net(), copy.deepcopy(config), "lora")
    with pytest.warns(UserWarning, match="'ora_' should not be contained in the prefix 'lora_'"):
        model.add_adapter("ora_", copy.deepcopy(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("lora_2", copy.deepcopy(config))


@BOTH
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": {"nope"}}, r"target_modules=\{'nope'\} were set but no module was matched\."),
        ({"target_parameters": ["nope"]}, r"target_parameters=\['nope'\] were set but no parameter was matched\."),
    ],
)
def test_half_of_what_is_named_matches_nothing(package, fields, message):
    config = package.LoraConfig(**{"target_modules": ["0"], "target_parameters": ["2.weight"], **fields})
    with pytest.warns(RuntimeWarning, match=message):
        package.get_peft_model(net(), config)


@BOTH
def test_the_version_of_the_files(package):
    assert package.LoraConfig().peft_version.startswith("0.21.")
    assert package.LoraConfig(peft_version="0.1").peft_version == "0.1"


@BOTH
def test_a_file_that_is_no_config(package, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"foo": 1}')
    with pytest.raises(TypeError, match="The LoraConfig config that is trying to be loaded is missing required keys"):
        package.LoraConfig.from_pretrained(tmp_path)


@BOTH
def test_a_state_dict_of_ones_own_is_what_is_saved(package, tmp_path):
    model = package.get_peft_model(net(), package.LoraConfig(target_modules=["0"]))
    halves = {key: value / 2 for key, value in model.state_dict().items()}
    model.state_dict = lambda: halves
    model.save_pretrained(tmp_path)
    loaded = package.PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(
        loaded.base_model.model[0].lora_A["default"].weight, halves["base_model.model.0.lora_A.default.weight"]
    )


@BOTH
def test_the_models_own_mapping_of_older_keys(package, tmp_path):
    class Newer(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.ModuleDict({"language_model": net()})
            self._checkpoint_conversion_mapping = {r"^(\d)": r"model.language_model.\1"}

    old = package.get_peft_model(net(), package.LoraConfig(target_modules=["0"]))
    old.save_pretrained(tmp_path)
    new = package.PeftModel.from_pretrained(Newer(), tmp_path)
    layer = new.base_model.model.model["language_model"][0]
    assert torch.equal(layer.lora_A["default"].weight, old.base_model.model[0].lora_A["default"].weight)


@BOTH
def test_tensors_of_another_size(package, tmp_path):
    package.get_peft_model(net(), package.LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    other = nn.Sequential(nn.Linear(65, 48), *net()[1:])
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model\.model\.0\.lora_A") as error:
        package.PeftModel.from_pretrained(other, tmp_path)
    assert "64" in str(error.value)
    assert "65" in str(error.value)


@BOTH
def test_embeddings_of_a_model_that_can_not_say_which_they_are(package, tmp_path):
    model = package.get_peft_model(net(), package.LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match=r"Could not identify embedding layer\(s\) because the model is not a"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)


@BOTH
def test_the_model_card_says_more_than_a_name(package, tmp_path):
    package.get_peft_model(net(), package.LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert len(card) > 1000
    assert "library_name: peft" in card
    assert "- lora" in card


class Own(nn.Module):
    """Linear, and no nn.Linear."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 64, 48
        self.weight = nn.Parameter(torch.randn(48, 64, generator=torch.Generator().manual_seed(2)))

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


@BOTH
def test_layers_of_ones_own(package, tmp_path):
    class OwnLayer(package.tuners.lora.Linear):
        pass

    def config():
        config = package.LoraConfig(target_modules=["0", "2"], init_lora_weights=False)
        config._register_custom_module({Own: OwnLayer})
        return config

    def base():
        return nn.Sequential(Own(), *net()[1:])

    with pytest.warns(UserWarning, match="Unsupported layer type .*Own.* encountered, proceed at your own risk"):
        model = package.get_peft_model(base(), config())
    assert type(model.base_model.model[0]) is OwnLayer
    assert type(model.base_model.model[2]) is package.tuners.lora.Linear
    x = torch.randn(3, 64)
    y = model(x)
    y.sum().backward()
    assert model.base_model.model[0].lora_B["default"].weight.grad is not None
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not supported"):
        package.PeftModel.from_pretrained(base(), tmp_path)
    loaded = package.PeftModel.from_pretrained(base(), tmp_path, config=config())
    assert torch.equal(loaded(x), y)
    torch.testing.assert_close(loaded.merge_and_unload()(x), y)


def test_one_of_our_own_layers_for_other_modules():
    config = lk.LoraConfig(target_modules=["0"])
    config._register_custom_module({Own: lk.LoraLinear})
    with pytest.warns(UserWarning, match="Unsupported layer type"):
        model = lk.get_peft_model(nn.Sequential(Own()), config)
    assert isinstance(model.base_model.model[0], lk.LoraLinear)
    with pytest.raises(TypeError, match="LoraLinear does not take a Own"):
        lk.LoraLinear(Own())


def test_layers_of_ones_own_that_are_none_of_ours_are_refused_by_name():
    class OwnLayer(nn.Module):
        pass

    peft.LoraConfig()._register_custom_module({nn.LSTM: OwnLayer})
    with pytest.raises(NotImplementedError, match=r"_register_custom_module: .*OwnLayer.*`peft` creates such a model"):
        lk.LoraConfig()._register_custom_module({nn.LSTM: OwnLayer})


@BOTH
def test_layers_of_an_injected_model_are_all_told_of(package):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=20))
    config = package.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = package.inject_adapter_in_model(config, base)
    model.lm_head.enable_adapters(False)
    names = [status.name for status in package.get_layer_status(model)]
    assert names == ["model.layers.0.self_attn.q_proj", "lm_head"]
    assert package.get_model_status(model).enabled == "irregular"


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("rows", [None, ["default", "__base__", "other"]])
def test_modules_of_factors_are_called_where_that_matters(rows):
    outputs, seen = [], []
    for package in (peft, lk):
        torch.manual_seed(1)
        config = package.LoraConfig(target_modules=["0", "2"], init_lora_weights=False)
        model = package.get_peft_model(net(), config)
        model.add_adapter("other", config)
        model.eval()
        first, last = model.base_model.model[0], model.base_model.model[2]
        torch.manual_seed(2)
        for layer in (first, last):
            for factor in (layer.lora_A, layer.lora_B):
                for name in ("default", "other"):
                    nn.init.normal_(factor[name].weight)
        first.lora_A["default"].register_forward_hook(lambda m, x, y, s=seen, p=package: s.append(p) or y + 1)
        last.lora_B["default"].__class__ = Doubled
        x = torch.linspace(-1, 1, 3 * 64).view(3, 64)
        outputs.append(model(x) if rows is None else model(x, adapter_names=rows))
    assert seen == [peft, lk]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
