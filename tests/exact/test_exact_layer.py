"""Exact merges in a layer: a stack that comes apart in any order, and leaves the bits of the weight."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from exact_cases import BF16, F16, F32, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lora_kernels as lk
from lora_kernels.layers import LoraEmbedding, LoraLinear

NAMES = ("a", "b", "c")


def layer_of(kind=LoraLinear, dtype=BF16, half_adapters=False, seed=0):
    """Three adapters of other ranks and scalings, all active."""
    torch.manual_seed(seed)
    base = nn.Linear(70, 45) if kind is LoraLinear else nn.Embedding(70, 45)
    layer = kind(base.to(dtype).requires_grad_(False))
    for r, name in enumerate(NAMES, 2):
        layer.update_layer(name, r, 1.5 * r + 3, init_lora_weights=False, autocast_adapter_dtype=not half_adapters)
    with torch.no_grad():
        for name, factor in layer.named_parameters():
            if "lora_" in name:
                factor.mul_(0.1)
    layer.set_adapter(list(NAMES))
    return layer.eval()


def merged_alone(layer, names):
    """The weight after merging ``names`` into the original, with the bare operation."""
    weight = layer.base_layer.weight.detach().clone()
    for name in names:
        lk.ops.merge_exact_(weight, *layer._exact_term(name, layer.scaling[name]))
    return weight


@pytest.mark.parametrize("kind", [LoraLinear, LoraEmbedding])
@pytest.mark.parametrize(("dtype", "half"), [(F32, False), (F16, True), (BF16, False), (BF16, True)], ids=str)
def test_every_order_of_removal(kind, dtype, half):
    layer = layer_of(kind, dtype, half)
    weight, original = layer.base_layer.weight, layer.base_layer.weight.detach().clone()
    states = {names: merged_alone(layer, names) for n in range(4) for names in itertools.combinations(NAMES, n)}
    for order in itertools.permutations(NAMES):
        layer.merge(exact=True)
        assert layer.merged_adapters == list(NAMES)
        assert same_bits(weight, states[NAMES])
        left = NAMES
        for name in order:
            layer.unmerge([name])
            left = tuple(n for n in left if n != name)
            assert layer.merged_adapters == list(layer.residuals) == list(left)
            assert same_bits(weight, states[left])
        assert same_bits(weight, original)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from([F32, F16, BF16]),
    steps=st.lists(st.tuples(st.sampled_from(["merge", "unmerge", "switch", "copy"]), *[st.sampled_from(NAMES)] * 2)),
)
def test_random_operations(dtype, steps):
    """At each moment the weight is what merging the stack, from the bottom up, into the original gives."""
    layer = layer_of(dtype=dtype)
    original, stack = layer_of(dtype=dtype), []
    for op, name, other in steps:
        if op == "merge" and name not in stack:
            layer.merge(adapter_names=[name], exact=True)
            stack.append(name)
        elif op == "unmerge" and name in stack:
            layer.unmerge([name])
            stack.remove(name)
        elif op == "switch" and name in stack and other not in stack:
            layer.switch(name, other)
            stack[stack.index(name)] = other
        elif op == "copy":
            layer = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
        assert layer.merged_adapters == stack
        assert same_bits(layer.base_layer.weight, merged_alone(original, stack))
    if stack:
        layer.unmerge()
    assert same_bits(layer.base_layer.weight, original.base_layer.weight)


def test_the_output_is_that_of_the_unmerged_layer():
    for kind, x in ((LoraLinear, torch.randn(6, 70)), (LoraEmbedding, torch.arange(70))):
        layer = layer_of(kind, F32)
        expected, base = layer(x), layer.base_layer(x)
        layer.merge(adapter_names=["b", "c"], exact=True)
        torch.testing.assert_close(layer(x), expected)
        layer.merge(adapter_names=["a"], exact=True)
        torch.testing.assert_close(layer(x), expected)
        layer.enable_adapters(False)
        torch.testing.assert_close(layer(x), base, rtol=1e-5, atol=1e-5)


def test_one_argument_replaces_all():
    layer = layer_of()
    layer.merge(adapter_names=["a", "b"], exact=True)
    wanted = merged_alone(layer_of(), ["c"])
    layer.switch("c")
    assert same_bits(layer.base_layer.weight, wanted)
    assert layer.merged_adapters == layer.active_adapters == ["c"]


def test_plain_switch_of_one_keeps_the_others():
    layer = layer_of(dtype=F32)
    x, original = torch.randn(4, 70), layer_of(dtype=F32)
    layer.merge(adapter_names=["a", "b"])
    layer.switch("a", "c")
    assert layer.merged_adapters == ["c", "b"]
    assert layer.active_adapters == ["c", "b"]
    original.set_adapter(["c", "b"])
    torch.testing.assert_close(layer(x), original(x), rtol=1e-4, atol=1e-5)


def test_scaling_set_while_merged_does_not_matter():
    layer = layer_of()
    before = layer.base_layer.weight.detach().clone()
    layer.merge(exact=True)
    layer.set_scale("a", 9.0)
    layer.unmerge(["b"])  # decodes a's neighbours and merges them again
    layer.unmerge()
    assert same_bits(layer.base_layer.weight, before)


def test_residuals_are_there_and_count_themselves():
    layer = layer_of()
    layer.merge(exact=True)
    assert list(layer.residuals) == list(NAMES)
    for residual in layer.residuals.values():
        assert residual.nbytes == sum(t.numel() for t in residual.to_tensors().values())
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    loaded.unmerge()
    assert same_bits(loaded.base_layer.weight, layer_of().base_layer.weight)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.base_layer.weight.view(-1)[7].add_(1), "weight"),
        (lambda m: m.lora_B["c"].weight[0].add_(1), "another adapter"),
        (lambda m: m.base_layer.float(), "float32"),
        (lambda m: m.lora_A["a"].weight[0].add_(1), "another adapter"),
    ],
)
def test_what_was_changed_meanwhile_is_an_error_that_changes_nothing(spoil, message):
    layer = layer_of()
    layer.merge(exact=True)
    with torch.no_grad():
        spoil(layer)
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        layer.unmerge()
    assert layer.merged_adapters == list(NAMES)
    assert same_bits(layer.base_layer.weight, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: (m.merge(adapter_names=["a"]), m.merge(adapter_names=["b"], exact=True)), "merged with exact=False"),
        (lambda m: (m.merge(adapter_names=["a"], exact=True), m.merge(adapter_names=["b"])), "merged with exact=True"),
        (lambda m: (m.merge(adapter_names=["a"], exact=True), m.unmerge(["b"])), "not merged"),
        (lambda m: (m.merge(adapter_names=["a"], exact=True), m.switch("b", "c")), "not merged"),
        (lambda m: (m.merge(adapter_names=["a", "b"], exact=True), m.switch("a", "b")), "merged already"),
        (lambda m: (m.merge(adapter_names=["a"], exact=True), m.switch("a", "x")), "no adapter 'x'"),
        (lambda m: m.merge(adapter_names=["x"], exact=True), "no adapter 'x'"),
    ],
)
def test_refused_by_name(call, message):
    layer = layer_of()
    with pytest.raises(ValueError, match=message):
        call(layer)
    if layer.merged:
        layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, layer_of().base_layer.weight, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_second_adapter_that_is_not_finite_takes_the_first_out_again(value):
    layer = layer_of()
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B["b"].weight[0, 0] = value
    with pytest.raises(ValueError, match="Inf or NaN"):
        layer.merge(exact=True)
    assert not layer.merged
    assert not layer.residuals
    assert same_bits(layer.base_layer.weight, before)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(6, 8, 3, dtype=BF16))
    original = model[0].weight.detach().clone()
    model = lk.get_peft_model(model, lk.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), "a")
    model.add_adapter("b", lk.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.merge_adapter(["a", "b"], exact=True)
    assert not same_bits(model.base_model.lora_layers()[0].weight, original)
    model.unmerge_adapter(["a"])
    model.unmerge_adapter()
    assert same_bits(model.base_model.lora_layers()[0].weight, original)


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_what_is_more_than_a_sum_is_refused_by_name(option):
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": ["0", "1"], "init_lora_weights": False}
    model = lk.get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), lk.LoraConfig(**config), "plain")
    model.add_adapter("other", lk.LoraConfig(**config, **{option: True}))
    before = [layer.weight.detach().clone() for layer in model.base_model.lora_layers()]
    with pytest.raises(ValueError, match=f"exact: adapter 'other' has {option}=True"):
        model.merge_adapter(["plain", "other"], exact=True)
    model.merge_adapter(["plain"], exact=True)
    with pytest.raises(ValueError, match=f"exact: adapter 'other' has {option}=True"):
        model.switch_adapter("plain", "other")
    assert model.active_adapters == ["plain"]
    model.unmerge_adapter()
    for layer, weight in zip(model.base_model.lora_layers(), before, strict=True):
        assert same_bits(layer.weight, weight)
    model.merge_adapter(["other"])
    assert model.base_model.lora_layers()[1].merged_adapters == ["other"]
