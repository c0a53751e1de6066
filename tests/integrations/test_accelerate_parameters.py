"""``accelerate`` on ``peft``'s ``ParamWrapper``: the same results and life, no updated stack, and a way back."""

import copy

import pytest
import torch
from layers.oracle import gradients, pair, same
from layers.parameter_cases import BOTH, FRUGAL, USES, Model, x
from torch.nn.utils import parametrize

import lora_kernels as lk
from lora_kernels.integrations.peft_layers import ParamWrapper
from lora_kernels.layers import low_rank, parameter

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(parameter, "SMALL", 0)


def both(make=Model, adapters=("default", "b"), **config):
    """Peft's model, accelerated, and as it was."""
    _, theirs = pair(make, adapters, **{**BOTH, **config})
    ours = copy.deepcopy(theirs)
    report = lk.accelerate(ours)
    return ours, theirs, report


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("use", USES)
def test_life(use, is_transposed):
    ours, theirs, report = both(lambda: Model(use, is_transposed), rank_pattern={"up": 3})
    assert len(report.replaced) == 2
    assert type(ours.base_model.model.experts) is ParamWrapper
    assert list(ours.state_dict()) == list(theirs.state_dict())
    same(ours, theirs, (x(),))
    gradients(ours, theirs, (x(),))
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "b"])
    same(ours, theirs, (x(),))
    gradients(ours, theirs, (x(),))
    for model in (ours, theirs):
        model.base_model.merge_adapter()
    same(ours, theirs, (x(),))
    for model in (ours, theirs):
        model.base_model.unmerge_adapter()
        model.base_model.set_adapter("b")
        model.delete_adapter("default")
        model.to(torch.bfloat16)
    same(ours, theirs, (x().bfloat16(),))
    with ours.disable_adapter(), theirs.disable_adapter():
        same(ours, theirs, (x().bfloat16(),))
    assert lk.restore(ours) == 2
    assert type(ours.base_model.model.experts) is type(theirs.base_model.model.experts)
    assert torch.equal(ours(x().bfloat16()), theirs(x().bfloat16()))
    assert list(ours.unload().state_dict()) == list(theirs.unload().state_dict())


@pytest.mark.parametrize("use", FRUGAL)
def test_the_updated_stack_is_not_built(use, monkeypatch):
    ours, theirs, _ = both(lambda: Model(use))
    built = []
    monkeypatch.setattr(low_rank, "whole", lambda *args: built.append(args))
    same(ours, theirs, (x(),))
    assert not built


def test_compiled():
    ours, theirs, _ = both(lambda: Model("all_experts"))
    same(torch.compile(ours, backend="eager"), theirs, (x(),))


def computed():
    model = Model()
    parametrize.register_parametrization(model.inp, "weight", torch.nn.Identity())
    return model


def test_what_stays_with_peft():
    ours, theirs, _ = both()
    for model in (ours, theirs):
        with pytest.raises(ValueError, match="mixed adapter batches"):
            model(x(2), adapter_names=["default", "b"])
    _, model = pair(computed, target_modules=[], target_parameters=["inp.weight"])
    assert "plain" in str(lk.accelerate(model))
    _, model = pair(Model, **BOTH)
    model.double()
    assert "float64" in str(lk.accelerate(model))
