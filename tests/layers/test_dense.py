"""Linear layers, transformers' Conv1D and embeddings with DoRA, a bias on B, and every way to start."""

import warnings

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels.layers import LoraTransposed

from .oracle import checkpoints, close, life, out, pair, randomize, same


def linear(bias=True):
    return lambda: nn.Sequential(nn.Linear(12, 9, bias=bias))


def conv1d():
    return nn.Sequential(Conv1D(9, 12))


def embedding():
    return nn.Sequential(nn.Embedding(11, 6, padding_idx=0))


VALUES = (torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(5)),)
IDS = (torch.tensor([[1, 4, 4], [10, 0, 2]]),)
KINDS = {
    "linear": (linear(), VALUES),
    "no_bias": (linear(False), VALUES),
    "conv1d": (conv1d, VALUES),
    "ids": (embedding, IDS),
}
OPTIONS = {"plain": {}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}, "rslora": {"use_rslora": True}}
CASES = [(k, o) for k in KINDS for o in OPTIONS if (k, o) not in {("ids", "bias"), ("no_bias", "bias")}]
CONFIG = {"target_modules": ["0"], "r": 4, "lora_alpha": 6}


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_life(kind, option):
    make, inputs = KINDS[kind]
    life(make, inputs, **CONFIG, fan_in_fan_out=kind == "conv1d", **OPTIONS[option])


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_checkpoints(kind, option, tmp_path):
    make, inputs = KINDS[kind]
    checkpoints(make, inputs, tmp_path, **CONFIG, fan_in_fan_out=kind == "conv1d", **OPTIONS[option])


def test_a_bias_on_b_needs_a_bias_to_be_merged():
    with pytest.warns(UserWarning, match="has no bias"):
        ours = lk.get_peft_model(linear(False)(), lk.LoraConfig(**CONFIG, lora_bias=True))
    randomize(ours)
    weight = ours.base_model.model[0].weight.clone()
    with pytest.raises(RuntimeError, match="has no bias"):
        ours.merge_adapter()
    assert torch.equal(ours.base_model.model[0].weight, weight)
    with pytest.raises(ValueError, match="lora_bias"):
        lk.get_peft_model(embedding(), lk.LoraConfig(**CONFIG, lora_bias=True))


@pytest.mark.parametrize("stored", [False, True])
def test_fan_in_fan_out_is_set_right_with_pefts_warnings(stored):
    make = conv1d if stored else linear()
    messages = []
    for module in (lk, peft):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = module.get_peft_model(make(), module.LoraConfig(**CONFIG, fan_in_fan_out=not stored))
        messages.append([str(w.message) for w in caught if "fan_in_fan_out" in str(w.message)])
        assert model.peft_config["default"].fan_in_fan_out is stored
    assert messages[0] == messages[1]
    assert len(messages[0]) == 1
    assert isinstance(lk.get_peft_model(conv1d(), lk.LoraConfig(**CONFIG)).base_model.model[0], LoraTransposed)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_gradients_under_dropout_take_the_dropped_input_on_both_paths(dropout):
    ours, theirs = pair(linear(), eval_mode=False, **CONFIG, use_dora=True, lora_dropout=dropout)
    torch.manual_seed(3)
    y = ours(*VALUES)
    torch.manual_seed(3)
    close(y, theirs(*VALUES).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dora_in_half_precision_is_no_further_from_float64_than_peft(dtype):
    ours, theirs = pair(lambda: linear()().to(dtype), **CONFIG, use_dora=True)
    same(ours, theirs, (VALUES[0].to(dtype),))


def test_a_row_of_zeros_gives_the_bias_where_peft_gives_nan():
    def make():
        model = linear()()
        with torch.no_grad():
            model[0].weight[3] = 0
        return model

    ours, theirs = (m.get_peft_model(make(), m.LoraConfig(**CONFIG, use_dora=True)) for m in (lk, peft))
    assert bool(theirs(*VALUES)[..., 3].isnan().all())
    close(ours(*VALUES)[..., 3], ours.base_model.model[0].bias[3].double().expand(2, 5))


INITS = [True, False, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4"]


@pytest.mark.parametrize(
    ("kind", "init"), [(k, i) for k in ("linear", "conv1d", "ids") for i in INITS if (k, i) != ("conv1d", "olora")]
)
def test_starts_like_peft(kind, init):
    make, inputs = KINDS[kind]
    models = []
    for module in (lk, peft):
        torch.manual_seed(1)
        config = module.LoraConfig(**CONFIG, init_lora_weights=init, fan_in_fan_out=kind == "conv1d")
        models.append(module.get_peft_model(make(), config).eval())
    ours, theirs = (m.state_dict() for m in models)
    assert list(ours) == list(theirs)
    for key in ours:
        close(ours[key], theirs[key].double(), torch.ones(()))
    close(out(models[0], inputs), out(models[1], inputs).double())


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("low", [False, True])
def test_loaded_pissa_and_olora_give_pefts_outputs_also_where_peft_fails(init, low, tmp_path):
    torch.manual_seed(1)
    theirs = randomize(peft.get_peft_model(linear()(), peft.LoraConfig(**CONFIG, init_lora_weights=init))).eval()
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(1)
    base = linear()()
    torch.manual_seed(1)
    ours = lk.PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=low).eval()
    close(ours(*VALUES), theirs(*VALUES).double())
    torch.manual_seed(1)
    plain = linear()()
    weight = plain[0].weight.clone()
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="missing"):
        lk.PeftModel.from_pretrained(plain, str(tmp_path))
    assert torch.equal(plain[0].weight, weight)


@pytest.mark.parametrize(("kind", "init"), [("linear", "pissa"), ("linear", "olora"), ("conv1d", "pissa")])
@pytest.mark.parametrize("low", [False, True])
def test_a_weight_narrower_than_the_rank_gives_factors_as_narrow(kind, init, low, tmp_path):
    make, inputs = KINDS[kind]
    config = {"target_modules": ["0"], "r": 10, "init_lora_weights": init, "fan_in_fan_out": kind == "conv1d"}

    def base():
        torch.manual_seed(1)
        return make()

    models = [module.get_peft_model(base(), module.LoraConfig(**config)).eval() for module in (lk, peft)]
    ours, theirs = (model.state_dict() for model in models)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert ours["base_model.model.0.lora_A.default.weight"].shape == (9, 12)
    close(out(models[0], inputs), out(models[1], inputs).double())
    for model, other in zip(map(randomize, models), (peft, lk), strict=True):
        model.save_pretrained(tmp_path)
        low_too = {"low_cpu_mem_usage": low} if other is lk else {}  # DIFFERENCES: peft fails
        loaded = other.PeftModel.from_pretrained(base(), str(tmp_path), **low_too).eval()
        close(out(model, inputs), out(loaded, inputs).double())


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_a_stored_transposed_weight_starts_from_its_own_matrix(init):
    """Peft's OLoRA decomposes the stored (in, out) matrix as if it were (out, in), and fails."""
    base = conv1d()
    before = base[0].weight.detach().clone()
    ours = lk.get_peft_model(base, lk.LoraConfig(**CONFIG, init_lora_weights=init, fan_in_fan_out=True))
    layer = ours.base_model.model[0]
    assert not torch.allclose(layer.weight, before, atol=1e-3)
    close(layer.weight + layer.get_delta_weight("default"), before.double(), torch.ones(()))
    if init == "olora":
        config = peft.LoraConfig(**CONFIG, init_lora_weights=init, fan_in_fan_out=True)
        theirs = peft.get_peft_model(conv1d(), config)
        with pytest.raises(RuntimeError):
            theirs(*VALUES)
