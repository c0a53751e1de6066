"""A linear layer with adapters, and the formula it is checked against."""

import torch
from torch import nn
from torch.nn import functional as F

from lora_kernels.layers import LoraLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(dtype=torch.float32, bias=True, shape=(12, 7), **options):
    layer = LoraLinear.from_linear(nn.Linear(*shape, bias=bias, dtype=dtype), r=4, lora_alpha=8, **options)
    for name in layer.r:
        nn.init.normal_(layer.lora_B[name].weight, std=0.3)
    return layer


def formula(layer, x, names=None, dtype=torch.float64):
    """Base plus the sum of the updates, in float64."""
    base = layer.base_layer
    x = x.to(dtype)
    y = F.linear(x, base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype))
    for name in layer.active_adapters if names is None else names:
        a, b = layer.lora_A[name].weight.to(dtype), layer.lora_B[name].weight.to(dtype)
        y = y + (x @ a.T) @ b.T * layer.scaling[name]
    return y


def close(y, expected, dtype=torch.float32):
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert y.dtype == dtype
    error = (y.double() - expected).norm() / expected.norm().clamp_min(1e-9)
    assert error <= tolerance, float(error)
