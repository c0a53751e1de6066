"""``LoraLinear`` and ``LoraEmbedding`` on their own, against the formula and PEFT's layers."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_kernels.layers import LoraEmbedding, LoraLinear

from .layer import DTYPES, close, formula, make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)])
def test_forward(dtype, autocast, shape):
    layer = make(dtype, autocast_adapter_dtype=autocast)
    assert layer.lora_A["default"].weight.dtype == (torch.float32 if autocast else dtype)
    x = torch.randn(shape, dtype=dtype)
    close(layer(x), formula(layer, x), dtype)


def test_state_dict_keys_and_scaling():
    layer = make()
    keys = ["base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight"]
    assert list(layer.state_dict()) == keys
    assert layer.scaling == {"default": 2.0}
    assert isinstance(layer.scaling["default"], float)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert layer.get_base_layer() is layer.base_layer
    assert not layer.base_layer.weight.requires_grad


def test_several_adapters_and_what_is_active():
    layer = make()
    layer.update_layer("b", 3, 6, use_rslora=True, init_lora_weights=False)
    x = torch.randn(5, 12)
    for names in (["b"], ["default", "b"], []):
        layer.set_adapter(names)
        close(layer(x), formula(layer, x, names))
        assert {n for n in layer.r if layer.lora_A[n].weight.requires_grad} == set(names)
    layer.set_adapter(["default", "b"])
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    layer.delete_adapter("b")
    close(layer(x), formula(layer, x, ["default"]))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_unmerge(dtype, safe):
    layer = make(dtype)
    layer.update_layer("b", 3, 6, init_lora_weights=False)
    layer.set_adapter(["default", "b"])
    x = torch.randn(5, 12, dtype=dtype)
    weight, expected = layer.weight.clone(), formula(layer, x)
    pointer = layer.weight.data_ptr()
    layer.merge(safe_merge=safe)
    assert layer.merged
    assert layer.merged_adapters == ["default", "b"]
    assert layer.weight.data_ptr() == pointer
    close(layer(x), expected, dtype)
    close(layer.weight, weight.double() + sum(delta(layer, n) for n in layer.r), dtype)
    layer.unmerge()
    close(layer.weight, weight.double(), dtype)
    assert not layer.merged


def delta(layer, name):
    return layer.get_delta_weight(name).double()


def test_merge_of_some_keeps_the_other_active_ones():
    layer = make()
    layer.update_layer("b", 3, 6, init_lora_weights=False)
    layer.set_adapter(["default", "b"])
    x = torch.randn(5, 12)
    expected = formula(layer, x)
    layer.merge(adapter_names=["b"])
    close(layer(x), expected)


def test_disabled_while_merged_leaves_the_weight_alone():
    layer = make()
    x = torch.randn(5, 12)
    expected = formula(layer, x, [])
    layer.merge()
    weight = layer.weight.clone()
    layer.enable_adapters(False)
    layer.scaling["default"] = 7.0  # of no consequence for what is merged
    close(layer(x), expected)
    assert torch.equal(layer.weight, weight)
    layer.unmerge()
    close(layer(x), expected)


def test_switch():
    layer = make()
    layer.update_layer("b", 3, 6, init_lora_weights=False)
    x = torch.randn(5, 12)
    expected = formula(layer, x, ["b"])
    layer.merge()
    layer.switch("b")
    assert layer.merged_adapters == ["b"]
    assert layer.active_adapters == ["b"]
    close(layer(x), expected)
    with pytest.raises(ValueError, match="merged already"):
        layer.switch("b")


def test_scaling_may_be_set():
    layer = make()
    x = torch.randn(5, 12)
    layer.set_scale("default", 0.5)
    assert layer.scaling["default"] == 1.0
    close(layer(x), formula(layer, x))
    layer.scale_layer(3)
    close(layer(x), formula(layer, x))
    layer.unscale_layer(2)
    assert layer.scaling["default"] == 1.5
    layer.unscale_layer()
    assert layer.scaling["default"] == 2.0
    layer.scaling["default"] = 0.25
    close(layer(x), formula(layer, x))


def test_set_scale_while_merged_does_not_break_unmerge():
    layer = make()
    weight = layer.weight.clone()
    layer.merge()
    layer.set_scale("default", 10)
    layer.unmerge()
    torch.testing.assert_close(layer.weight, weight)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_whole_and_independent(clone, merged):
    layer = make(use_rslora=True)
    if merged:
        layer.merge()
    x = torch.randn(5, 12)
    other = clone(layer)
    assert torch.equal(other(x), layer(x))
    assert other.merged_adapters == layer.merged_adapters
    before = layer(x)
    other.scaling["default"] = 9.0
    assert torch.equal(layer(x), before)
    assert other.scaling_default.item() == 9.0
    other.update_layer("b", 2, 2)
    assert list(layer.r) == ["default"]


def test_moves_keep_the_scaling_in_float32():
    layer = make(use_rslora=True).bfloat16()
    assert layer.scaling_default.dtype == torch.float32
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.scaling_default.item(), layer.scaling["default"])
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    close(layer(x), formula(layer, x), torch.bfloat16)
    close(layer.float()(x.float()), formula(layer, x))
    moved = layer.to("meta")
    assert moved.scaling_default.is_meta
    assert moved(x.float().to("meta")).shape == (5, 7)


def test_nothing_is_stale_after_parameters_are_replaced():
    layer = make()
    x = torch.randn(5, 12)
    layer(x)
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(4, 12))
    close(layer(x), formula(layer, x))
    layer.lora_B["default"] = nn.Linear(4, 7, bias=False)
    close(layer(x), formula(layer, x))
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()}, assign=True)
    close(layer(x), formula(layer, x))
    layer.base_layer = nn.Linear(12, 7)
    close(layer(x), formula(layer, x))
    values = {k: torch.randn_like(v) for k, v in layer.state_dict().items()}
    y = torch.func.functional_call(layer, values, x)
    layer.load_state_dict(values)
    close(y, formula(layer, x))


def test_dropout_is_on_the_update_only_and_only_in_training():
    layer = make(lora_dropout=0.5, shape=(64, 32))
    x = torch.randn(100, 64)
    close(layer.eval()(x), formula(layer, x))
    layer.train()
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    layer.lora_dropout["default"].p = 0.0
    close(layer(x), formula(layer, x))
    layer.lora_dropout["default"].p = 0.5
    layer.set_scale("default", 0)
    close(layer(x), formula(layer, x, []))


@pytest.mark.parametrize("several", [False, True])
def test_gradients(several):
    layer = make()
    if several:
        layer.update_layer("b", 3, 6, init_lora_weights=False)
        layer.set_adapter(["default", "b"])
    x = torch.randn(5, 12, requires_grad=True)
    grads = torch.autograd.grad(layer(x).square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])
    expected = torch.autograd.grad(
        formula(layer, x).square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)]
    )
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5)


def test_merge_between_forward_and_backward_is_an_error():
    layer = make()
    y = layer(torch.randn(5, 12, requires_grad=True)).sum()
    layer.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("state", ["single", "two", "merged", "disabled", "off"])
def test_compiles_whole(state):
    layer = make()
    layer.update_layer("b", 3, 6, init_lora_weights=False)
    if state == "two":
        layer.set_adapter(["default", "b"])
    elif state in ("merged", "disabled"):
        layer.merge()
        layer.enable_adapters(state == "merged")
    elif state == "off":
        layer.enable_adapters(False)
    x = torch.randn(5, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_scaling_change_does_not_recompile():
    layer = make()
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    x = torch.randn(5, 12)
    for scale in (0.5, 1.0, 3.0):
        layer.set_scale("default", scale)
        close(compiled(x).detach(), formula(layer, x))
    assert count.frame_count == 1


@pytest.mark.parametrize("autocast", [torch.bfloat16])
def test_autocast(autocast):
    layer = make()
    layer.update_layer("b", 3, 6, init_lora_weights=False)
    x = torch.randn(5, 12)
    for names in (["default"], ["default", "b"]):
        layer.set_adapter(names)
        with torch.autocast("cpu", dtype=autocast):
            close(layer(x), formula(layer, x), autocast)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.update_layer("default", 4, 8), ValueError, "taken"),
        (lambda m: m.update_layer("b", 0, 8), ValueError, "r:"),
        (lambda m: m.update_layer("b", -1, 8), ValueError, "r:"),
        (lambda m: m.update_layer("b", 2.0, 8), TypeError, "r:"),
        (lambda m: m.update_layer("b", 2, None), TypeError, "lora_alpha"),
        (lambda m: m.update_layer("b", 2, 2, lora_dropout=2), ValueError, "lora_dropout"),
        (lambda m: m.update_layer("b", 2, 2, init_lora_weights="eva"), ValueError, "init_lora_weights"),
        (lambda m: m.update_layer("a.b", 2, 2), ValueError, "adapter_name"),
        (lambda m: m.update_layer("../b", 2, 2), ValueError, "adapter_name"),
        (lambda m: m.update_layer("keys", 2, 2), ValueError, "adapter_name"),
        (lambda m: m.update_layer("", 2, 2), TypeError, "adapter_name"),
        (lambda m: m.delete_adapter("b"), ValueError, "no adapter 'b'"),
        (lambda m: m.merge(adapter_names=["b"]), ValueError, "no adapter 'b'"),
        (lambda m: m.merge(adapter_names="default"), TypeError, "adapter_names"),
        (lambda m: (m.merge(), m.delete_adapter("default")), ValueError, "merged"),
        (lambda m: m.switch("default"), ValueError, "merge"),
        (lambda m: m.set_scale("b", 1), ValueError, "no adapter 'b'"),
        (lambda m: m.get_delta_weight("b"), ValueError, "no adapter 'b'"),
        (lambda m: LoraLinear.from_linear(nn.LayerNorm(3)), TypeError, "base_layer"),
        (lambda m: LoraLinear.from_linear(nn.Linear(3, 3).double()).merge(exact=True), TypeError, "float64"),
        (lambda m: LoraLinear.from_peft(nn.Linear(3, 3)), TypeError, "peft_layer"),
        (lambda m: m(torch.randn(3, 11)), (ValueError, RuntimeError), "11"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call, error, message):
    layer = make()
    with pytest.raises(error, match=message):
        call(layer)
    if layer.merged:
        layer.unmerge()
    assert list(layer.r) == list(layer.lora_A) == list(layer.lora_dropout) == list(layer.scaling) == ["default"]
    x = torch.randn(5, 12)
    close(layer(x), formula(layer, x))


def test_safe_merge_of_nan_leaves_the_weight():
    layer = make()
    weight = layer.weight.clone()
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, weight)
    assert not layer.merged


def test_nothing_makes_a_temporary_of_the_size_of_the_weight():
    layer = LoraLinear.from_linear(nn.Linear(1024, 1024), r=4, init_lora_weights=False)
    layer.update_layer("b", 4, 4, init_lora_weights=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer.merge(safe_merge=True)
        layer.switch("b")
        layer(torch.randn(2, 1024))
        layer.unmerge()
        layer.set_requires_grad("b")
        layer(torch.randn(2, 1024)).sum().backward()
    largest = max(e.cpu_memory_usage for e in profile.events())
    assert largest < layer.weight.nbytes / 4, largest


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype, padding_idx):
    base = nn.Embedding(20, 6, padding_idx=padding_idx, dtype=dtype)
    layer = LoraEmbedding(base)
    layer.set_adapter("default")
    layer.update_layer("default", 3, 6, init_lora_weights=False)
    ids = torch.tensor([[1, 2, 3], [2, 2, 19]])
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    expected = base.weight[ids].double() + (b.double() @ a.double()).T[ids] * 2
    close(layer(ids), expected, dtype)
    layer(ids).float().sum().backward()
    if padding_idx is not None:
        assert not a.grad[:, padding_idx].any()
    weight = layer.weight.clone()
    layer.merge()
    close(layer(ids), expected, dtype)
    # What the merge rounded stays, and what comes back is rounded once more.
    lost = torch.finfo(dtype).eps * (layer.weight.double().abs() + weight.double().abs()) + 1e-6
    layer.enable_adapters(False)
    assert ((layer(ids).double() - weight[ids]).abs() <= lost[ids]).all()
    layer.unmerge()
    assert ((layer.weight.double() - weight).abs() <= lost).all()
    assert list(layer.state_dict()) == [
        "base_layer.weight",
        "lora_embedding_A.default",
        "lora_embedding_B.default",
    ]


def test_embedding_max_norm_leaves_the_adapter_alone():
    layer = LoraEmbedding(nn.Embedding(20, 6, max_norm=0.5))
    layer.set_adapter("default")
    layer.update_layer("default", 3, 6, init_lora_weights=False)
    before = layer.lora_embedding_A["default"].clone()
    layer(torch.arange(20))
    assert torch.equal(layer.lora_embedding_A["default"], before)
