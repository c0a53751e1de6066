"""``accelerate`` on models of real ``peft``: the same results."""

import copy

import pytest
import torch
from accelerate_cases import batch, layers, made, pair, paths, peft, same, same_step

import lora_kernels as lk

# Results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_adapters", [False, True])
def test_outputs_and_gradients(dtype, half_adapters, monkeypatch):
    theirs, ours = pair(dtype=dtype, autocast_adapter_dtype=not half_adapters)
    same_step(theirs, ours, batch(dtype))
    calls = paths(monkeypatch)
    with torch.inference_mode():
        for rows in ((1,), (), (2, 0), (2, 3, 4)):
            y = ours(batch(dtype, rows))
            assert not calls
            same(y, theirs(batch(dtype, rows)))
            calls.clear()


def test_several_active_adapters_and_none(monkeypatch):
    theirs, ours = pair("a", "b", "c")
    for active in (["a", "b"], ["c", "a", "b"], ["b"], "c"):
        for model in (theirs, ours):
            model.base_model.set_adapter(active)
        same_step(theirs, ours, batch())
    calls = paths(monkeypatch)
    ours.base_model.set_adapter(["a", "b"])
    ours(batch())
    assert not calls
    with ours.disable_adapter():
        torch.testing.assert_close(ours(batch()), ours.base_model.model.head(features(ours)), rtol=0, atol=0)
    ours.base_model.set_adapter("nobody")
    theirs.base_model.set_adapter("nobody")
    torch.testing.assert_close(ours(batch()), theirs(batch()), rtol=0, atol=0)


def features(model):
    net, x = model.base_model.model, batch()
    up, down, up2 = (layer.base_layer for layer in (net.up, net.down, net.up2))
    return torch.tanh(up2(x + down(torch.tanh(up(x)))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    theirs, ours = pair("a", "b", dtype=dtype)
    for active in (["a"], ["a", "b"]):
        for model in (theirs, ours):
            model.base_model.set_adapter(active)
        same_step(theirs, ours, batch(), lambda: torch.autocast("cpu", torch.bfloat16))


def test_float64_and_refused_input_are_left_to_peft():
    theirs = made().double()
    ours = copy.deepcopy(theirs)
    report = lk.accelerate(ours)
    assert not report.replaced
    assert "float64" in str(report)
    theirs, ours = pair()
    for model in (theirs, ours):
        model.double()  # after accelerate
    torch.testing.assert_close(ours(batch(torch.float64)), theirs(batch(torch.float64)), rtol=0, atol=0)
    theirs, ours = pair()
    with pytest.raises(RuntimeError):
        ours(batch(torch.bfloat16))


def test_dropout_is_ours_in_training_and_off_in_eval():
    theirs, ours = pair(lora_dropout=0.3, targets=("up",))
    x, layer = batch(rows=(1,)), layers(ours)[0]
    plain = layers(theirs)[0].eval()(x).detach()
    ours.train()
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), first, rtol=0, atol=0)
    assert not torch.allclose(layer(x), first)
    many = torch.stack([layer(x).detach() for _ in range(3000)])
    error = (many.mean(0) - plain).abs() / (many.std(0) / 3000**0.5)
    assert float(error.max()) < 5
    same(ours.eval()(x), theirs.eval()(x))


def test_scaling_follows_peft_at_each_call():
    theirs, ours = pair("a", "b")
    for change in (
        lambda layer: layer.set_scale("a", 3.0),
        lambda layer: layer.scale_layer(0.25),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.scaling.update(a=7),
        lambda layer: layer.scaling.update(a=torch.tensor(-1.5)),
    ):
        for model in (theirs, ours):
            for layer in layers(model):
                change(layer)
        same(ours(batch()), theirs(batch()))
    with peft.helpers.rescale_adapter_scale(theirs, 0.5), peft.helpers.rescale_adapter_scale(ours, 0.5):
        same(ours(batch()), theirs(batch()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_adapter_a_row(dtype, monkeypatch):
    theirs, ours = pair("a", "b", "c", dtype=dtype)
    theirs.eval(), ours.eval()
    names = ["b", "__base__", "a", "b"]
    with torch.no_grad():
        expected = theirs(batch(dtype), adapter_names=names)
        calls = paths(monkeypatch)
        same(ours(batch(dtype), adapter_names=names), expected)
        assert not calls
        same(ours(batch(dtype), adapter_names=["__base__"] * 4), theirs(batch(dtype), adapter_names=["__base__"] * 4))
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        ours(batch(dtype), adapter_names=["a"])
    with pytest.raises(ValueError, match="training mode"):
        ours.train()(batch(dtype), adapter_names=names)
    ours.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        ours(batch(dtype), adapter_names=names)
