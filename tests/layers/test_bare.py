"""Modules made without their constructors, and our ways through a model, against torch's own."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels import bare
from lora_kernels.walk import each_module, into_eval, named_modules, submodule


def state(module):
    return {key: (type(value), value) for key, value in module.__dict__.items() if key != "_parameters"}


@pytest.mark.parametrize(("make", "kind"), [
    (bare.module_dict, nn.ModuleDict), (bare.parameter_dict, nn.ParameterDict), (bare.identity, nn.Identity),
])  # fmt: skip
def test_what_the_constructor_makes(make, kind):
    made, other, expected = make(), make(), kind()
    assert type(made) is kind
    assert state(made) == state(expected)
    shared = [
        key for key, value in made.__dict__.items() if isinstance(value, (dict, set)) and value is other.__dict__[key]
    ]
    assert not shared, "two modules must not share a container"
    assert type(pickle.loads(pickle.dumps(made))) is kind
    assert state(copy.deepcopy(made)) == state(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(16, 8), (5, 3), (384, 1)])
def test_a_linear_layer_is_torchs_to_the_bit(size, bias, dtype):
    torch.manual_seed(0)
    expected, after = nn.Linear(*size, bias=bias, dtype=dtype), torch.rand(1)
    torch.manual_seed(0)
    made, then = bare.linear(*size, bias, "cpu", dtype), torch.rand(1)
    assert torch.equal(after, then)
    assert state(made) == state(expected)
    assert made._parameters.keys() == expected._parameters.keys()
    assert all(torch.equal(made.state_dict()[key], value) for key, value in expected.state_dict().items())
    assert bare.linear(*size, bias, "meta", dtype).weight.is_meta


def test_a_patched_way_to_register_parameters_is_gone_through():
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        assert bare.linear(4, 3, True, "cpu", torch.float32).weight.is_meta
        assert nn.Linear(4, 3).weight.is_meta
    assert not bare.linear(4, 3, True, "cpu", torch.float32).weight.is_meta


def model():
    inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    tree = nn.Module()
    tree.first, tree.again, tree.nothing = inner, inner, None
    tree.body = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), inner[0]), "attention": nn.MultiheadAttention(4, 2)})
    return lk.get_peft_model(tree, lk.LoraConfig(target_modules=["0", "attention"], modules_to_save=["1"]))


def test_walks_are_those_of_torch():
    tree = model()
    assert list(each_module(tree)) == list(tree.modules())
    assert list(named_modules(tree)) == list(tree.named_modules())
    for path, module in tree.named_modules():
        assert submodule(tree, path) is module
    with pytest.raises(AttributeError, match="missing"):
        submodule(tree, "base_model.missing")


def test_into_eval_calls_a_train_of_their_own():
    class Counts(nn.Linear):
        calls = 0

        def train(self, mode=True):
            Counts.calls += 1
            return super().train(mode)

    tree = nn.Sequential(Counts(2, 2), nn.Dropout(0.5), nn.Sequential(nn.BatchNorm1d(2)))
    into_eval(tree)
    assert Counts.calls == 1
    assert not any(module.training for module in tree.modules())
