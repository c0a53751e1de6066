"""The names, signatures, statuses and errors that code written for PEFT relies on."""

import contextlib
import copy
import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.helpers import disable_input_dtype_casting, rescale_adapter_scale
from lora_kernels.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from .models import randomize, tiny, token_ids

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = {
    "": "get_peft_model PeftModel LoraConfig TaskType PeftType PeftConfig LoraModel LoraRuntimeConfig "
    "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights inject_adapter_in_model get_layer_status "
    "get_model_status PeftError NoMatchingPeftModuleError PeftWarning cast_mixed_precision_params AutoPeftModel "
    "AutoPeftModelForCausalLM PeftModelForCausalLM PeftModelForSequenceClassification PeftModelForFeatureExtraction "
    "PeftModelForTokenClassification PeftModelForQuestionAnswering PeftModelForSeq2SeqLM "
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING get_peft_config "
    "convert_to_lora save_as_lora",
    ".tuners.lora": "LoraLayer LoraModel LoraConfig Linear Embedding convert_to_lora",
    ".tuners.lora.layer": "LoraLayer Linear Embedding",
    ".tuners.tuners_utils": "BaseTuner BaseTunerLayer",
    ".utils": "infer_device ModulesToSaveWrapper get_peft_model_state_dict SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME",
    ".utils.hotswap": "hotswap_adapter prepare_model_for_compiled_hotswap hotswap_adapter_from_state_dict",
    ".utils.save_and_load": "load_peft_weights set_peft_model_state_dict",
    ".helpers": "check_if_peft_model rescale_adapter_scale disable_input_dtype_casting update_forward_signature "
    "update_generate_signature update_signature",
    ".optimizers": "create_loraplus_optimizer",
    ".functional": "set_adapter delete_adapter set_requires_grad cast_adapter_dtype inject_adapter_in_model",
    ".peft_model": "get_layer_status get_model_status PeftModel TunerLayerStatus TunerModelStatus",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_peft_has_them(module):
    theirs, ours = (importlib.import_module(package + module) for package in ("peft", "lora_kernels"))
    for name in NAMES[module].split():
        assert hasattr(theirs, name), name
        assert hasattr(ours, name), name


SIGNATURES = [
    "get_peft_model",
    "inject_adapter_in_model",
    "PeftModel.add_adapter",
    "PeftModel.set_adapter",
    "PeftModel.delete_adapter",
    "PeftModel.set_requires_grad",
    "LoraModel.add_weighted_adapter",
    "PeftModelForCausalLM.forward",
    "PeftModelForSeq2SeqLM.forward",
    "PeftModelForSeq2SeqLM.generate",
    "PeftModelForSequenceClassification.forward",
    "PeftModelForTokenClassification.forward",
    "PeftModelForQuestionAnswering.forward",
    "PeftModelForFeatureExtraction.forward",
]


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures_begin_as_those_of_peft(path):
    found = []
    for package in (peft, lk):
        function = package
        for part in path.split("."):
            function = getattr(function, part)
        parameters = inspect.signature(function).parameters.values()
        found.append([(p.name, p.default) for p in parameters if p.kind is not p.KEYWORD_ONLY])
    assert found[1] == found[0]


def both(**values):
    for package in (peft, lk):
        config = package.LoraConfig(r=4, target_modules=["q_proj", "embed"], **values)
        made = package.get_peft_model(tiny(), config)
        made.add_adapter("b", package.LoraConfig(r=2, target_modules=["v_proj"], **values))
        yield package, made


STEPS = {
    "new": lambda m: None,
    "b": lambda m: m.set_adapter("b"),
    "both": lambda m: m.base_model.set_adapter(["default", "b"]),
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "merged": lambda m: m.merge_adapter(),
    "frozen": lambda m: m.set_requires_grad("default", False),
    "irregular": lambda m: m.base_model.model.layers[0].q_proj.enable_adapters(False),
    "quantised": lambda m: setattr(
        m.base_model.model.layers[0].q_proj, "quantization_backend", SimpleNamespace(backend_name="bnb 8bit")
    ),
    "half-frozen": lambda m: m.base_model.model.layers[0].q_proj.lora_A["default"].requires_grad_(False),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("saved", [None, ["head"]])
def test_statuses_equal_those_of_peft(step, saved):
    if step == "both":
        saved = None  # of two that save one module in full, only one can be active
    found = []
    for package, made in both(modules_to_save=saved):
        STEPS[step](made)
        layers = [vars(status) for status in package.get_layer_status(made)]
        assert [vars(status) for status in made.get_layer_status()] == layers
        found.append([*layers, vars(package.get_model_status(made))])
    for ours, theirs in zip(found[1], found[0], strict=True):
        if step in ("disabled", "irregular"):  # which freezes PEFT's adapters, see the test below
            for status in (ours, theirs):
                status.update(requires_grad=None, trainable_params=None)
        assert ours == theirs


def test_nothing_trains_while_disabled():
    for package, made in both():
        with made.disable_adapter():
            assert package.get_model_status(made).requires_grad["default"] is False
            made.set_adapter("default")  # chooses anew what trains
        assert package.get_model_status(made).requires_grad["default"] is True
        made.base_model.disable_adapter_layers()
        made.base_model.disable_adapter_layers()
        assert not [n for n, p in made.named_parameters() if p.requires_grad]
        made.base_model.enable_adapter_layers()
        assert package.get_model_status(made).requires_grad["default"] is True


def test_disabling_does_not_change_what_is_trained():
    found = []
    for package, made in both():
        made.set_adapter("default", inference_mode=True)
        with made.disable_adapter():
            pass
        found.append(package.get_model_status(made).requires_grad["default"])
    assert found == [True, False]  # PEFT trains what was frozen


def test_status_of_a_model_without_adapters():
    for package in (peft, lk):
        with pytest.raises(ValueError, match="No adapter layers found"):
            package.get_layer_status(nn.Linear(2, 2))


ERRORS = {
    "set": (lambda p, m: m.set_adapter("x"), ValueError, "Adapter x not found."),
    "delete": (lambda p, m: m.delete_adapter("x"), ValueError, "Adapter x does not exist"),
    "add": (
        lambda p, m: m.add_adapter("b", p.LoraConfig(target_modules=["q_proj"])),
        ValueError,
        "Adapter with name 'b' already exists.",
    ),
    "nothing": (
        lambda p, m: m.add_adapter("c", p.LoraConfig(target_modules=["zz"])),
        ValueError,
        "Target modules .*zz.* not found in the base model",
    ),
    "merge": (lambda p, m: m.merge_adapter("default"), TypeError, "expected a list of str|should be a list of strings"),
    "scale": (lambda p, m: rescale(p, m, "2"), TypeError, "multiplier should be of type float"),
}


def rescale(package, model, multiplier):
    helpers = importlib.import_module(package.__name__ + ".helpers")
    with helpers.rescale_adapter_scale(model, multiplier):
        return model(token_ids())


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_those_of_peft(case):
    call, error, message = ERRORS[case]
    for package, made in both():
        with pytest.raises(error, match=message):
            call(package, made)
    assert issubclass(lk.NoMatchingPeftModuleError, (lk.PeftError, ValueError))


def test_rescaling_ends_with_the_context():
    found = []
    for package, made in both():
        randomize(made)
        before = made(token_ids())
        found.append(rescale(package, made, 0.5))
        assert not torch.allclose(found[-1], before)
        torch.testing.assert_close(made(token_ids()), before)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="only supported"), rescale_adapter_scale(nn.Linear(2, 2), 2.0):
        pass
    with disable_input_dtype_casting(made):
        torch.testing.assert_close(made(token_ids()), before)


def test_scaling_may_be_assigned_as_a_dict():
    model = randomize(lk.get_peft_model(tiny(), lk.LoraConfig(target_modules=["head"])))
    layer, base = model.get_base_model().head, tiny()
    once = model(token_ids()) - base(token_ids())
    layer.scaling = {name: 3 * value for name, value in layer.scaling.items()}
    torch.testing.assert_close(model(token_ids()) - base(token_ids()), 3 * once, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [False, True])
def test_injection_returns_the_model_itself(given):
    """And with a state dict its keys are the targets, whatever the config leaves out, with a warning."""
    found = []
    for package in (peft, lk):
        model = tiny()
        config = package.LoraConfig(r=4, target_modules=["q_proj"])
        assert package.inject_adapter_in_model(config, model) is model
        keys = {"layers.0.v_proj.lora_A.weight": None} if given else None
        limits = {"exclude_modules": ["layers.0.v_proj"], "layers_to_transform": [1]} if given else {}
        second = package.LoraConfig(r=2, target_modules=["v_proj"], **limits)
        warned = pytest.warns(RuntimeWarning, match="inconsistency") if given else contextlib.nullcontext()
        with warned:
            package.inject_adapter_in_model(second, model, "b", state_dict=keys)
        randomize(model)
        state = package.get_peft_model_state_dict(model, adapter_name="b")
        found.append((model(token_ids()), {k: v.shape for k, v in state.items()}, set(model.state_dict())))
        assert model.layers[0].v_proj.active_adapters == ["b"]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    assert found[1][1:] == found[0][1:]


def test_functions_on_an_injected_model():
    functional = importlib.import_module("lora_kernels.functional")
    model = lk.inject_adapter_in_model(lk.LoraConfig(target_modules=["q_proj"]), tiny(dtype=torch.bfloat16))
    assert model.layers[0].q_proj.lora_A["default"].weight.dtype == torch.bfloat16
    functional.cast_adapter_dtype(model, "default")
    assert model.layers[0].q_proj.lora_A["default"].weight.dtype == torch.float32
    functional.set_adapter(model, "default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    functional.set_requires_grad(model, "default")
    assert model.layers[0].q_proj.lora_A["default"].weight.requires_grad
    functional.delete_adapter(model, "default")
    assert not any("lora_A" in key for key in model.state_dict())


def saved(path, seed, **values):
    model = lk.get_peft_model(tiny(), lk.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **values}))
    randomize(model, seed).save_pretrained(path)
    return model


def test_hotswap(tmp_path):
    model = saved(tmp_path / "one", 1).eval()
    other = saved(tmp_path / "two", 2, r=2, lora_alpha=3, target_modules=["q_proj"]).eval()
    parameters = dict(model.named_parameters())
    hotswap_adapter(model, tmp_path / "two", "default")
    torch.testing.assert_close(model(token_ids()), other(token_ids()))
    assert all(p is parameters[n] for n, p in model.named_parameters())
    saved(tmp_path / "three", 3, target_modules=["q_proj", "head"])
    before = model(token_ids())
    with pytest.raises(RuntimeError, match=r"unexpected keys found: .*head"):
        hotswap_adapter(model, tmp_path / "three", "default")
    saved(tmp_path / "four", 3, use_rslora=True)
    with pytest.raises(ValueError, match="Configs are incompatible: for use_rslora, False != True"):
        hotswap_adapter(model, tmp_path / "four", "default")
    torch.testing.assert_close(model(token_ids()), before)
    model.merge_adapter()
    with pytest.raises(ValueError, match="currently merged"):
        hotswap_adapter(model, tmp_path / "two", "default")


def test_padding_for_hotswap_changes_no_output(tmp_path):
    model = saved(tmp_path / "one", 1).eval()
    wide = saved(tmp_path / "wide", 2, r=7).eval()
    before = model(token_ids())
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    torch.testing.assert_close(model(token_ids()), before)
    parameters = dict(model.named_parameters())
    hotswap_adapter(model, tmp_path / "wide", "default")
    torch.testing.assert_close(model(token_ids()), wide(token_ids()))
    assert all(p is parameters[n] for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="No adapter layers"):
        prepare_model_for_compiled_hotswap(nn.Linear(2, 2))


def test_base_state_dict_round_trip():
    base = tiny()
    model = lk.get_peft_model(tiny(), lk.LoraConfig(target_modules=["q_proj", "embed"], modules_to_save=["head"]))
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj", "embed"], modules_to_save=["head"]))
    state = lk.get_base_model_state_dict(model)
    assert set(state) == set(base.state_dict()) == set(peft.get_base_model_state_dict(theirs))
    other = {key: value + 1 for key, value in state.items()}
    assert lk.set_base_model_state_dict(model, other) == ([], [])
    assert torch.equal(model.get_base_model().layers[0].q_proj.base_layer.weight, other["layers.0.q_proj.weight"])
    with pytest.raises(RuntimeError, match="Unexpected"):
        lk.set_base_model_state_dict(model, {**other, "x": torch.zeros(1)})


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**size, vocab_size=50, num_labels=3)
    torch.manual_seed(0)
    return {
        "SEQ_CLS": transformers.BertForSequenceClassification(config),
        "TOKEN_CLS": transformers.BertForTokenClassification(config),
        "QUESTION_ANS": transformers.BertForQuestionAnswering(transformers.BertConfig(**size, vocab_size=50)),
        "FEATURE_EXTRACTION": transformers.BertModel(config),
        "CAUSAL_LM": transformers.BertLMHeadModel(config),
    }


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "CAUSAL_LM"])
def test_task_classes(bert, task, tmp_path):
    found = []
    ids = token_ids()
    for package in (peft, lk):
        model = package.get_peft_model(copy.deepcopy(bert[task]), package.LoraConfig(task_type=task, r=2))
        assert type(model).__name__ == package.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__
        randomize(model).eval()
        output = model(ids, torch.ones_like(ids))
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        found.append((output[0], trained))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert found[0][1] == found[1][1]
    model.save_pretrained(tmp_path)
    loaded = lk.PeftModel.from_pretrained(copy.deepcopy(bert[task]), tmp_path)
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded.eval()(input_ids=ids)[0], model(input_ids=ids)[0])


def test_auto_model(bert, tmp_path):
    bert["CAUSAL_LM"].save_pretrained(tmp_path / "base")
    base = type(bert["CAUSAL_LM"]).from_pretrained(tmp_path / "base")
    model = randomize(lk.get_peft_model(base, lk.LoraConfig(task_type="CAUSAL_LM", r=2))).eval()
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = lk.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert type(loaded) is lk.PeftModelForCausalLM
    torch.testing.assert_close(loaded(token_ids()).logits, model(token_ids()).logits)
    with pytest.raises(ValueError, match="Expected target PEFT class: PeftModelForCausalLM"):
        lk.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="from_pretrained"):
        lk.AutoPeftModel()


def test_another_revision_is_told():
    config = {"target_modules": ["q_proj"], "revision": "v1"}
    for package in (lk, peft):
        with pytest.warns(UserWarning, match="already set base model revision to v1, overwriting with revision main"):
            model = package.get_peft_model(tiny(), package.LoraConfig(**config), revision="main")
        assert model.peft_config["default"].revision == "main"
