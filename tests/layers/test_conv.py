"""Convolutions: against peft where it is right, against float64 and the merged convolution where it is not."""

import copy

import peft
import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.layers import LoraConv

from .oracle import checkpoints, close, life, out, pair, randomize, same

CONVS = {
    "1d": (nn.Conv1d, (2, 6, 9), {}),
    "2d": (nn.Conv2d, (2, 6, 7, 5), {"padding": 1, "stride": 2}),
    "2d_1x1": (nn.Conv2d, (2, 6, 4, 5), {"kernel_size": 1, "bias": False}),
    "3d": (nn.Conv3d, (1, 6, 4, 5, 6), {"padding": (0, 1, 1)}),
}


def model(kind, **options):
    options = {"kernel_size": 3, **options}
    return lambda: nn.Sequential(kind(6, 10, **options), nn.Identity())


def inputs(shape):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(5)),)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", CONVS)
def test_life(case, dora):
    kind, shape, options = CONVS[case]
    life(model(kind, **options), inputs(shape), target_modules=["0"], r=4, lora_alpha=6, use_dora=dora)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", CONVS)
def test_checkpoints(case, dora, tmp_path):
    kind, shape, options = CONVS[case]
    checkpoints(model(kind, **options), inputs(shape), tmp_path, target_modules=["0"], r=4, use_dora=dora)


def test_channels_last_is_merged_in_place():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3).to(memory_format=torch.channels_last)
    ours = lk.get_peft_model(nn.Sequential(conv), lk.LoraConfig(target_modules=["0"], r=4)).eval()
    randomize(ours)
    x = torch.randn(2, 6, 7, 7)
    expected, pointer = ours(x), conv.weight.data_ptr()
    ours.merge_adapter()
    assert conv.weight.data_ptr() == pointer
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    close(ours(x), expected.double())
    weight = conv.weight.detach() - ours.base_model.model[0].get_delta_weight("default")
    ours.unmerge_adapter()
    close(conv.weight, weight.double())


def test_groups_equal_peft_and_a_merge_is_refused_before_anything_changes():
    make = lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 10, 3, groups=2))  # noqa: E731
    x = inputs((2, 6, 7, 5))
    ours, theirs = pair(make, target_modules=["0", "1"], r=4)
    same(ours, theirs, x)
    weights = [copy.deepcopy(m.state_dict()) for m in (ours, theirs)]
    with pytest.raises(NotImplementedError, match="groups > 1"):
        ours.merge_adapter()
    with pytest.raises(NotImplementedError, match="groups > 1"):
        theirs.merge_adapter()
    assert all(torch.equal(v, weights[0][k]) for k, v in ours.state_dict().items())
    assert not all(torch.equal(v, weights[1][k]) for k, v in theirs.state_dict().items())  # peft: merged half-way
    with pytest.raises(ValueError, match="divisible by groups"):
        lk.get_peft_model(make(), lk.LoraConfig(target_modules=["1"], r=3))


def dense(layer, x, names=("default",)):
    """The float64 convolution with the update in its weight."""
    base = copy.deepcopy(layer.get_base_layer()).double()
    with torch.no_grad():
        for name in names:
            base.weight += layer.get_delta_weight(name).double()
    return base(x.double())


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.Conv1d, (2, 6, 12)), (nn.Conv2d, (2, 6, 9, 8)), (nn.Conv3d, (1, 6, 7, 7, 7))]
)
def test_dilation_where_peft_fails(kind, shape):
    make = model(kind, dilation=2)
    ours, theirs = pair(make, target_modules=["0"], r=4)
    x = inputs(shape)
    with pytest.raises(RuntimeError):
        theirs(*x)
    layer = ours.base_model.model[0]
    close(layer(*x), dense(layer, *x))
    ours.merge_adapter()
    close(layer(*x), layer.get_base_layer()(*x).double())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_mode_where_peft_pads_with_zeros(mode):
    make = model(nn.Conv2d, padding=1, padding_mode=mode)
    ours, theirs = pair(make, target_modules=["0"], r=4)
    (x,) = inputs((2, 6, 7, 5))
    layer = ours.base_model.model[0]
    exact = dense(layer, x)
    close(layer(x), exact)
    wrong = theirs.base_model.model[0](x)
    assert (wrong - exact).norm() / exact.norm() > 0.1  # peft's error
    lk.peft_compat(ours, conv_zero_padding=True)
    close(layer(x), wrong.double())
    lk.peft_compat(ours, conv_zero_padding=False)
    close(layer(x), exact)


def test_dora_with_groups_takes_the_norm_of_the_rows_that_are_there():
    """Peft reads B's columns in the order of another shape: with B not zero its norm is of no row."""
    make = model(nn.Conv2d, groups=2)
    ours, theirs = pair(make, target_modules=["0"], r=4, use_dora=True)
    (x,) = inputs((2, 6, 7, 5))
    layer = ours.base_model.model[0]
    base, delta = layer.base_layer.weight.double(), layer.get_delta_weight("default").double()
    whole = torch.zeros_like(delta)
    whole[:5, :3], whole[5:, 3:] = base[:5], base[5:]
    whole = whole + delta
    magnitude = layer.lora_magnitude_vector["default"].weight.double()
    factors = magnitude.view(-1) / whole.flatten(1).norm(dim=1)
    bias = layer.base_layer.bias.double()
    exact = nn.functional.conv2d(x.double(), whole * factors.view(-1, 1, 1, 1), bias)
    close(layer(x), exact)
    assert (theirs.base_model.model[0](x) - exact).norm() / exact.norm() > 0.01


def test_bias_on_b_and_dropout():
    make = model(nn.Conv1d)
    life(make, inputs((2, 6, 9)), target_modules=["0"], r=4, lora_bias=True)
    ours = lk.get_peft_model(make(), lk.LoraConfig(target_modules=["0"], r=4, lora_dropout=0.5))
    randomize(ours)
    (x,) = inputs((2, 6, 9))
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_starts_like_peft(init):
    torch.manual_seed(1)
    ours = lk.get_peft_model(model(nn.Conv2d)(), lk.LoraConfig(target_modules=["0"], init_lora_weights=init))
    torch.manual_seed(1)
    theirs = peft.get_peft_model(model(nn.Conv2d)(), peft.LoraConfig(target_modules=["0"], init_lora_weights=init))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_what_can_not_be_is_refused():
    for init in ("pissa", "olora", "orthogonal"):
        with pytest.raises(ValueError, match="init_lora_weights"):
            lk.get_peft_model(model(nn.Conv2d)(), lk.LoraConfig(target_modules=["0"], init_lora_weights=init))
    with pytest.raises(TypeError, match="base_layer"):
        LoraConv(nn.Linear(3, 3))
    x = inputs((2, 6, 9))
    ours, _ = pair(model(nn.Conv1d), adapters=("default", "b"), target_modules=["0"])
    rows = ours(*x, adapter_names=["b", "__base__"])
    ours.set_adapter("b")
    assert torch.allclose(rows[:1], out(ours, x)[:1], atol=1e-6)
