"""Adapters of bare parameters: checkpoints, refusals, nested layers, statuses and merging, against peft."""

import copy
import re
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lora_kernels as lk
from lora_kernels.layers import LoraParameter

from .oracle import checkpoints, close, gradients, pair, randomize, same
from .parameter_cases import BOTH, OUTER, Experts, Model, x


@pytest.mark.parametrize(
    "config",
    [BOTH, {"target_modules": ["inp"], "target_parameters": ["up"], "r": 3}, {**BOTH, "rank_pattern": {"down": 5}}],
)
def test_checkpoints_both_ways(tmp_path, config):
    checkpoints(Model, (x(),), tmp_path, **config)


class Mixed(Experts):
    """Experts that hold a linear layer."""

    def __init__(self):
        super().__init__("by_expert")
        self.mix = nn.Linear(OUTER, OUTER)

    def forward(self, x):
        return super().forward(self.mix(x))


class Block(nn.Module):
    """A parameter beside a module with parameters."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(OUTER, OUTER))
        self.experts = Mixed()

    def forward(self, x):
        return self.experts(x @ self.gain)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(5, OUTER)
        self.block = Block()

    def forward(self, x):
        return self.block(self.inp(x))


INSIDE = {"target_modules": ["mix"], "target_parameters": ["experts.up", "experts.down"]}


def test_a_layer_inside_of_a_module_with_adapted_parameters(tmp_path):
    ours, theirs = pair(Nested, **INSIDE)
    same(ours, theirs, (x(),))
    gradients(ours, theirs, (x(),))
    checkpoints(Nested, (x(),), tmp_path, **INSIDE)
    torch.manual_seed(0)
    loaded = lk.PeftModel.from_pretrained(Nested(), str(tmp_path / "theirs")).eval()
    loaded.load_adapter(str(tmp_path / "ours"), "other")  # the names are those of the wrapped module now
    before = loaded(x())
    loaded.set_adapter("other")
    assert torch.equal(loaded(x()), before)
    for package, model in ((lk, ours), (peft, theirs)):
        model.add_adapter("b", package.LoraConfig(**INSIDE))
        mix = model.get_submodule("base_model.model.block.experts.base_layer.base_layer.mix")
        assert ("b" in mix.lora_A) is (package is lk)  # which peft does not look into again


def test_parameters_inside_of_a_module_with_an_adapted_parameter(tmp_path):
    config = {"target_modules": ["mix"], "target_parameters": ["gain", "up", "down"]}
    with pytest.raises(AttributeError):
        peft.get_peft_model(Nested(), peft.LoraConfig(**config))
    torch.manual_seed(0)
    ours = randomize(lk.get_peft_model(Nested(), lk.LoraConfig(**config))).eval()
    assert [type(m).__name__ for m in ours.base_model.lora_layers()] == ["LoraParameter"] * 3 + ["LoraLinear"]
    y = ours(x())
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    twin = lk.PeftModel.from_pretrained(Nested(), str(tmp_path)).eval()
    assert torch.equal(twin(x()), y)
    whole = twin.merge_and_unload()
    close(whole(x()), y.double())
    assert list(whole.state_dict()) == list(Nested().state_dict())


def test_adapters_load_in_any_order(tmp_path):
    ours, theirs = pair(Model, ("default", "other"), **BOTH)
    expected = {}
    for name in ("default", "other"):
        theirs.set_adapter(name)
        expected[name] = theirs(x())
    for side, model, package in (("ours", ours, peft), ("theirs", theirs, lk)):
        model.save_pretrained(tmp_path / side)
        torch.manual_seed(0)
        loaded = package.PeftModel.from_pretrained(Model(), str(tmp_path / side / "other"), "other").eval()
        result = loaded.load_adapter(str(tmp_path / side), "default")
        assert not result.unexpected_keys
        assert not [key for key in result.missing_keys if ".other." not in key]
        for name, y in expected.items():
            loaded.set_adapter(name)
            close(loaded(x()), y.double())


def each(call):
    """``call(package)`` for both: results, or errors of one class with one message up to its end."""
    found = []
    for package in (peft, lk):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found.append(call(package))
            except Exception as error:
                found.append(error)
    theirs, ours = found
    assert isinstance(theirs, Exception) == isinstance(ours, Exception), found
    if isinstance(theirs, Exception):
        assert type(theirs).__name__ == type(ours).__name__
        assert str(ours).startswith(re.split(r"[.;]|Make sure", str(theirs))[0]), found
    return found


@pytest.mark.parametrize(
    "change",
    [
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"target_parameters": ["nothing"]},
        {"target_parameters": []},
        {"target_parameters": "down"},
        {"target_parameters": ["inp.bias"]},
        {"target_modules": ["inp"], "target_parameters": ["inp.weight"]},
    ],
)
def test_what_peft_refuses_is_refused_and_leaves_the_model(change):
    models = {}

    def call(package):
        models[package] = Model()
        return package.get_peft_model(models[package], package.LoraConfig(**{**BOTH, **change}))

    assert isinstance(each(call)[1], Exception)
    if lk in models:
        assert not any("lora" in name for name, _ in models[lk].named_modules())
        assert all(p.requires_grad for p in models[lk].parameters())


def test_other_refusals():
    class Top(nn.Module):
        def __init__(self):
            super().__init__()
            self.param = nn.Parameter(torch.zeros(4, 4))

    each(lambda package: package.get_peft_model(Top(), package.LoraConfig(target_parameters=["param"])))
    models = {}

    def second(package):
        models[package] = package.get_peft_model(Model(), package.LoraConfig(**BOTH))
        models[package].add_adapter("b", package.LoraConfig(target_parameters=["experts.up"], target_modules=[]))

    each(second)
    assert list(models[lk].peft_config) == ["default"]
    for names in (["default", "__base__"], ["default", "unknown"]):
        each(lambda package, names=names: models[package].eval()(x(2), adapter_names=names))
    each(lambda package: models[package].add_weighted_adapter(["default"], [1.0], "c"))
    for package in (peft, lk):
        with pytest.raises((ValueError, AttributeError)):
            package.get_peft_model(Model(), package.LoraConfig(**BOTH, init_lora_weights="pissa"))
        with pytest.raises(TypeError, match="modules_to_save"):
            package.get_peft_model(Model(), package.LoraConfig(**BOTH, modules_to_save=["experts"]))
        state = dict(models[package].state_dict())
        with pytest.raises(ValueError, match="target_parameters"):
            package.inject_adapter_in_model(package.LoraConfig(**BOTH), Model(), state_dict=state)
    whole = Model()
    whole.experts.up = nn.Parameter(torch.zeros(3, 10, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="int8"):
        lk.get_peft_model(whole, lk.LoraConfig(**BOTH))


def test_a_name_that_matches_nothing_warns_and_the_closest_are_named():
    with pytest.warns(RuntimeWarning, match=r"\['dwon'\] matched nothing.*down"):
        lk.get_peft_model(Model(), lk.LoraConfig(target_modules=[], target_parameters=["dwon", "up"]))
    with pytest.raises(lk.NoMatchingPeftModuleError, match=r"experts\.down"):
        lk.get_peft_model(Model(), lk.LoraConfig(target_modules=[], target_parameters=["expert.dwon"]))


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "olora", "orthogonal", "pissa_niter_3"])
def test_initial_values(init):
    config = {"target_parameters": ["inp.weight"], "target_modules": [], "init_lora_weights": init, "r": 2}
    base = Model()
    plain = base(x())
    models = []
    for package in (lk, peft):
        torch.manual_seed(1)
        models.append(package.get_peft_model(copy.deepcopy(base), package.LoraConfig(**config)))
    ours, theirs = (model.base_model.model.inp for model in models)
    close(ours.get_base_layer().weight, theirs.get_base_layer().weight.double())
    close(ours.get_delta_weight("default"), theirs.get_delta_weight("default").double(), torch.ones(()))
    if init != "orthogonal":
        close(models[0](x()), plain.double())
    if init in (True, "gaussian"):
        assert torch.equal(ours.lora_A["default"].weight, theirs.lora_A["default"].weight)


# Status, moves, merging


def test_tree_statuses_and_moves():
    ours, theirs = pair(Model, ("default", "b"), **BOTH)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours.base_model.model).replace("LoraLinear", "Linear") == repr(theirs.base_model.model)
    for a, b in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
        assert vars(a) == vars(b)
    assert vars(ours.get_model_status()) == vars(theirs.get_model_status())
    layer, other = (model.base_model.model.experts for model in (ours, theirs))
    assert isinstance(layer, LoraParameter)
    assert lk.tuners.lora.layer.ParamWrapper is LoraParameter
    for name in ("parameter_name", "num_experts", "in_features", "out_features", "r", "scaling", "merged_adapters"):
        assert getattr(layer, name) == getattr(other, name), name
    assert layer.get_param() is layer.get_base_layer().down
    for name in ("default", "b"):
        close(layer.get_delta_weight(name), other.get_delta_weight(name).double())
    a, b = (p.get_peft_model_state_dict(m, adapter_name="b") for p, m in ((lk, ours), (peft, theirs)))
    assert sorted(a) == sorted(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
    fresh = lk.get_peft_model(copy.deepcopy(Model()), lk.LoraConfig(**BOTH), "b").eval()
    lk.set_peft_model_state_dict(fresh, b, "b")
    close(fresh.base_model.model.experts.get_delta_weight("b"), other.get_delta_weight("b").double())
    for model in (ours, theirs):
        model.to(torch.bfloat16)
    same(ours, theirs, (x().bfloat16(),))
    meta = lk.get_peft_model(Model(), lk.LoraConfig(**BOTH), low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in meta.named_parameters() if "lora_" in n)
    lk.set_peft_model_state_dict(meta, a, "default")
    assert not any(p.is_meta for p in meta.parameters())


def test_injection_without_a_peft_model():
    model, other = Model(), Model()
    other.load_state_dict(model.state_dict())
    model = randomize(lk.inject_adapter_in_model(lk.LoraConfig(**BOTH), model))
    other = randomize(peft.inject_adapter_in_model(peft.LoraConfig(**BOTH), other))
    assert list(model.state_dict()) == list(other.state_dict())
    same(model, other, (x(),))


def test_exact_merging_where_there_is_one_matrix_and_refusal_where_there_are_several():
    ours, _ = pair(Model, target_modules=[], target_parameters=["inp.weight"])
    weight = ours.base_model.model.inp.get_param()
    before, y = weight.detach().clone(), ours(x())
    ours.merge_adapter(exact=True)
    assert not torch.equal(weight, before)
    close(ours(x()), y.double())
    ours.unmerge_adapter()
    assert torch.equal(weight, before)
    ours, _ = pair(Model, **BOTH)
    with pytest.raises(ValueError, match="stack of matrices"):
        ours.merge_adapter(exact=True)
    assert not ours.base_model.lora_layers()[0].merged
    with torch.no_grad():
        ours.base_model.model.experts.lora_A["default"].weight[0] = float("nan")
    before = ours.base_model.model.experts.base_layer.get_param().detach().clone()
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
        ours.merge_and_unload(safe_merge=True)
    assert torch.equal(ours.base_model.model.experts.base_layer.get_param(), before)


class PlusOne(nn.Module):
    def forward(self, x):
        return x + 1


def computed(name):
    model = Model()
    owner, _, parameter_name = name.rpartition(".")
    parametrize.register_parametrization(model.get_submodule(owner), parameter_name, PlusOne())
    return model


def test_a_matrix_that_is_computed_already():
    ours, theirs = pair(lambda: computed("inp.weight"), target_modules=[], target_parameters=["inp.weight"])
    same(ours, theirs, (x(),))
    gradients(ours, theirs, (x(),))
    y, before = ours(x()), theirs(x())
    theirs.merge_adapter()
    assert (theirs(x()) - before).norm() > 0.05 * before.norm()  # what was merged is lost
    with pytest.raises(ValueError, match="computed"):
        ours.merge_adapter()
    assert torch.equal(ours(x()), y)
    torch.manual_seed(0)
    assert torch.equal(ours.unload()(x()), computed("inp.weight")(x()))


def test_a_stack_that_is_computed_already():
    ours, theirs = pair(lambda: computed("experts.down"), target_modules=[], target_parameters=["experts.down"])
    plain = copy.deepcopy(ours).unload()
    with torch.no_grad():
        plain.experts.parametrizations.down.original += ours.base_model.model.experts.get_delta_weight("default")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            once, again = theirs(x()), theirs(x())
    assert (again - once).norm() > 0.01 * once.norm()  # peft leaves a copy of the update behind at each call
    for _ in range(2):
        close(ours(x()), plain(x()).double())
    assert len(ours.base_model.model.experts.base_layer.parametrizations.down) == 1


def test_one_expert_stored_transposed_fails_in_peft():
    class One(nn.Module):
        is_transposed = True

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(1, 5, 7))

        def forward(self, x):
            return x @ self.w[0]

    ours, theirs = pair(lambda: nn.Sequential(One()), target_modules=[], target_parameters=["w"])
    with pytest.raises(RuntimeError):
        theirs(x())
    layer = ours.base_model.model[0]
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = x().double() @ (layer.get_param()[0].double() + a.t() @ b.t())
    close(ours(x()), exact)


def test_merging_into_a_module_that_is_used_twice_changes_only_its_own_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(Experts("by_expert"))
            self.second = self.first[0]

        def forward(self, x):
            return self.second(self.first(x[:, [0, 1, 2, 3, 4, 0]]))

    ours = randomize(lk.get_peft_model(Twice(), lk.LoraConfig(**{**BOTH, "target_parameters": ["up", "down"]}))).eval()
    module, y = ours.base_model.model.second, ours(x())
    weights = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    for _ in range(2):
        ours.merge_adapter()
        close(ours(x()), y.double())
        assert all(torch.equal(weight, weights[name]) for name, weight in module.named_parameters())
        ours.unmerge_adapter()
        assert ours.base_model.model.first[0].get_base_layer() is module
        assert torch.equal(ours(x()), y)


def test_an_embedding_has_low_rank_updates_or_trained_rows():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 6)
            self.experts = Experts("by_expert")

        def forward(self, ids):
            return self.experts(self.words(ids))

    config = {"target_parameters": ["words.weight", "up"], "target_modules": []}
    with pytest.raises(ValueError, match="words"):
        lk.get_peft_model(Words(), lk.LoraConfig(**config, trainable_token_indices={"words": [1]}))
    ours, theirs = pair(Words, **config)
    ids = torch.tensor([1, 8, 3])
    same(ours, theirs, (ids,))
    gradients(ours, theirs, (ids,))
    config = {"target_parameters": ["up", "down"], "trainable_token_indices": {"words": [1, 3]}}
    ours, theirs = pair(Words, target_modules=[], **config)
    same(ours, theirs, (ids,))
    gradients(ours, theirs, (ids,))
