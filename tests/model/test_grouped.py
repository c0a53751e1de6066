"""Projections that read the same input, computed together by the first: the same results, and apart when it matters."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.layers import grouped
from lora_kernels.ops import proof
from lora_kernels.testing import assert_within_budget


class Attention(nn.Module):
    """Q, K and V of one input, or of two; gate and up."""

    def __init__(self, size=16):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(size, size), nn.Linear(size, 8), nn.Linear(size, 8)
        self.gate_proj, self.up_proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 24, bias=False)
        self.between = None

    def forward(self, x, other=None):
        q = self.q_proj(x)
        if self.between is not None:
            self.between(self, x)
        other = x if other is None else other
        h = torch.tanh(self.k_proj(other)) * self.v_proj(other)
        return q, self.gate_proj(h) * self.up_proj(h)


def _model(always=True, **options):
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], "r": 4} | options
    model = lk.get_peft_model(nn.Sequential(Attention(), nn.Identity()), lk.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, lk.LoraLinear)}
    if always:
        assert len(grouped.group_siblings(layers, always=True)) == 2
    return model


@pytest.fixture
def calls(monkeypatch):
    """How many projections each grouped call had."""
    found, run = [], grouped.grouped_lora_linear

    def counted(x, weights, *rest):
        found.append(len(weights))
        return run(x, weights, *rest)

    monkeypatch.setattr(grouped, "grouped_lora_linear", counted)
    return found


def _apart(model):
    """A copy whose layers compute each on its own."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__dict__.pop("_group", None)
    return model


def _gradients(model, x, *more):
    x = x.clone().requires_grad_()
    y = model(x, *more) if not more else model.base_model.model[0](x, *more)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(sum(part.sum() for part in y), [x, *trained.values()])
    return [*y, *grads]


def _same(ours, expected):
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_the_same_results_and_gradients(calls):
    model, x = _model(), torch.randn(3, 5, 16)
    _same(_gradients(model, x), _gradients(_apart(model), x))
    assert calls == [3, 2]
    with torch.no_grad():
        _same(model(x), _apart(model)(x))
    assert calls == [3, 2, 3, 2]
    assert getattr(grouped._held, "now", None) is None


def test_a_model_groups_its_projections_and_computes_them_apart_on_a_cpu(calls):
    model = _model(always=False)
    attention = model.base_model.model[0]
    assert attention.q_proj._group.layers == (attention.q_proj, attention.k_proj, attention.v_proj)
    assert attention.up_proj._group.layers == (attention.gate_proj, attention.up_proj)
    model(torch.randn(2, 16))
    assert calls == []


def test_it_pays_only_where_the_kernels_are_proven_or_asked_for(monkeypatch):
    assert not grouped.pays(torch.zeros(1))
    on_gpu = type("OnGpu", (), {"is_cuda": True, "device": torch.device("cuda", 0)})()
    for ops, pays in ((frozenset(), False), (frozenset({"grouped_lora_linear"}), True)):
        monkeypatch.setattr(proof, "of_device", lambda index, ops=ops: {"cuda": frozenset(), "triton": ops})
        assert grouped.pays(on_gpu) is pays


def test_a_copy_has_groups_of_its_own(calls):
    model = _model()
    twin = copy.deepcopy(model)
    attention = twin.base_model.model[0]
    assert attention.q_proj._group.layers[1] is attention.k_proj
    _same(twin(torch.ones(2, 16)), model(torch.ones(2, 16)))
    assert calls == [3, 2, 3, 2]


def test_another_input_dissolves_the_group(calls):
    model, x, other = _model(), torch.randn(4, 16), torch.randn(4, 16)
    _same(_gradients(model, x, other), _gradients(_apart(model), x, other))
    assert model.base_model.model[0].q_proj._group.dissolved
    calls.clear()
    _same(_gradients(model, x), _gradients(_apart(model), x))
    assert calls == [2]


def _write_x(attention, x):
    x.mul_(2)


def _write_adapter(attention, x):
    attention.k_proj.lora_A["default"].weight.data = attention.k_proj.lora_A["default"].weight.data * 3
    attention.v_proj.lora_B["default"].weight.mul_(2)


def _rescale(attention, x):
    attention.v_proj.scale_layer(3.0)


def _disable(attention, x):
    attention.k_proj.enable_adapters(False)


def _replace(attention, x):
    attention.v_proj.base_layer.weight = nn.Parameter(torch.ones(8, 16))


@pytest.mark.parametrize("change", [_write_x, _write_adapter, _rescale, _disable, _replace])
def test_a_change_between_two_projections_is_seen(change, calls):
    model, x = _model(), torch.randn(4, 16)
    apart = _apart(model)
    for each in (model, apart):
        each.base_model.model[0].between = change
    with torch.no_grad():
        _same(model(x.clone()), apart(x.clone()))
    assert calls[0] == 3


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_one_op_can_not_do_is_computed_apart(options, calls):
    model, x = _model(**options), torch.randn(4, 16)
    model.train()
    model(x)
    assert calls == []


def test_a_hook_on_a_base_layer_is_called(calls):
    model = _model()
    seen = []
    model.base_model.model[0].v_proj.base_layer.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(2, 16))
    assert seen == [1]
    assert calls == [2]


def test_merged_and_mixed_batches(calls):
    model, x = _model(), torch.randn(3, 16)
    expected = _apart(model)(x)
    model.merge_adapter()
    _same(model(x), expected)
    model.unmerge_adapter()
    model.add_adapter("second", lk.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.eval()
    names = ["default", "second", "__base__"]
    _same(model(x, adapter_names=names), _apart(model)(x, adapter_names=names))
    assert calls == []


def test_several_active_adapters_and_one_that_touches_a_part(calls):
    model, x = _model(), torch.randn(3, 16)
    model.add_adapter("second", lk.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.set_adapter("second")
    _same(model(x), _apart(model)(x))
    model.base_model.set_adapter(["default", "second"])
    _same(model(x), _apart(model)(x))


def test_in_place_on_an_output():
    model, x = _model(), torch.randn(2, 3, 16)
    outputs = [model.base_model.model[0].q_proj(x), model.base_model.model[0].k_proj(x)]
    (outputs[0].mul_(2).sum() + outputs[1].add_(1).sum()).backward()


def test_autocast_and_checkpointing(calls):
    model, x = _model(), torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, apart = model(x), _apart(model)(x)
    for left, right, exact in zip(ours, apart, _apart(model)(x), strict=True):
        assert_within_budget(left, right, exact)  # what lies between is rounded elsewhere
    run = lambda each: torch.utils.checkpoint.checkpoint(each, x, use_reentrant=False)  # noqa: E731
    grads = [torch.autograd.grad(sum(part.sum() for part in run(each)), x)[0] for each in (model, _apart(model))]
    torch.testing.assert_close(*grads)
    assert calls == [3, 2, 3, 2, 3, 2]


def test_compiled_layers_are_apart(calls):
    model, x = _model(), torch.randn(4, 16)
    with torch.no_grad():
        _same(torch.compile(model, backend="aot_eager")(x), _apart(model)(x))
    assert calls == []
