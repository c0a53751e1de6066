"""``LoraConv``: convolutions in one, two and three dimensions.

A is a convolution like the base layer with ``r`` outputs, over all input channels; B is a 1×1 convolution on top,
in as many groups as the base layer has. Together ``W (out, in·k) += B A`` on the weight as a matrix.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..initial import PLAIN_INITS
from .base import LoraLayer, factor_keys

_FUNCTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class LoraConv(LoraLayer):
    """An ``nn.Conv1d``, ``Conv2d`` or ``Conv3d`` with LoRA adapters; ``forward`` as the base layer.

    Stride, padding, padding mode and dilation of A are those of the base layer. With groups the update reads all
    input channels, which a grouped weight has no place for: such a layer can not be merged.

    Attributes:
        zero_padding: pad the adapters' input with zeros whatever the padding mode, as PEFT does: for adapters that
            were trained so.
    """

    base_class = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    inits = PLAIN_INITS
    zero_padding = False

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.in_features, self.out_features = base_layer.in_channels, base_layer.out_channels

    def _check_options(self, init, r, *, lora_dropout, use_dora, lora_bias):
        groups = self.base_layer.groups
        if r % groups:
            raise ValueError(
                f"Targeting a {type(self.base_layer).__name__} with groups={groups} and rank {r}. "
                "Currently, support is limited to conv layers where the rank is divisible by groups. "
                "Either choose a different rank or do not target this specific layer."
            )
        super()._check_options(init, r, lora_dropout=lora_dropout, use_dora=use_dora, lora_bias=lora_bias)

    def _make_adapter(self, name, r, device, dtype, bias):
        base, options = self.base_layer, {"device": device, "dtype": dtype}
        kind = next(kind for kind in self.base_class if isinstance(base, kind))
        self.lora_A[name] = kind(
            base.in_channels,
            r,
            base.kernel_size,
            base.stride,
            base.padding,
            base.dilation,
            bias=False,
            padding_mode=base.padding_mode,
            **options,
        )
        self.lora_B[name] = kind(r, base.out_channels, 1, groups=base.groups, bias=bias, **options)

    @staticmethod
    def checkpoint_keys(base, name, r, *, use_dora=False, lora_bias=False):
        """Of an adapter: key in a checkpoint -> (key in this layer, shape)."""
        ones = (1,) * len(base.kernel_size)
        a, b = (r, base.in_channels, *base.kernel_size), (base.out_channels, r // base.groups, *ones)
        return factor_keys(name, a, b, (1, base.out_channels, *ones), use_dora, lora_bias)

    # Computing

    def _update(self, name, x):
        a, b = self.lora_A[name], self.lora_B[name]
        return b(self._convolve(a, x.to(a.weight.dtype)))

    def _convolve(self, a, x):
        if self.zero_padding and a.padding_mode != "zeros":
            return _FUNCTIONS[a.weight.dim()](x, a.weight, None, a.stride, a.padding, a.dilation)
        return a(x)

    def _base_product(self, x):
        base = self.base_layer
        return base._conv_forward(x.to(base.weight.dtype), base.weight, None)

    def _column(self, vector, y):
        return vector.reshape(-1, *[1] * len(self.base_layer.kernel_size))

    # The weight as a matrix

    def _order(self):
        """The dimensions of the weight after the first as they lie in memory (channels_last moves them)."""
        weight = self.weight
        return sorted(range(1, weight.dim()), key=weight.stride, reverse=True)

    def _as_matrix(self, tensor):
        return tensor.permute(0, *self._order()).flatten(1)

    def _matrices(self):
        if self.base_layer.groups > 1:
            raise NotImplementedError(
                "Merging is not supported for _ConvNd layers with groups > 1! The update reads all input channels, "
                "and the weight holds those of one group"
            )
        weight = self._plain_weight()
        matrix = self._as_matrix(weight)
        if matrix.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            raise ValueError(f"weight: strides {weight.stride()} have gaps; expected a dense weight to merge into")
        return [matrix]

    def _factors(self, name):
        a, b = self.lora_A[name].weight, self.lora_B[name].weight.flatten(1)
        return self._as_matrix(a), _spread(b, self.base_layer.groups)

    def get_delta_weight(self, adapter):
        """``scaling · B A``, (out_channels, in_channels, k…): with groups, over all input channels."""
        self._known(adapter)
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight.flatten(1)
        delta = _spread(b, self.base_layer.groups) @ a.flatten(1) * self.scaling[adapter]
        return delta.view(-1, *a.shape[1:])

    def magnitude_shape(self):
        """The shape of the magnitudes of a DoRA adapter."""
        return (1, self.out_features, *[1] * len(self.base_layer.kernel_size))

    def _norm_matrix(self):
        weight, groups = self.weight.detach(), self.base_layer.groups
        if groups > 1:
            return _spread(weight.flatten(1), groups)  # each group reads its own block of the input channels
        return self._as_matrix(weight)

    def _norm_factors(self, name):
        a, b = self._factors(name)
        return (self.lora_A[name].weight.flatten(1), b) if self.base_layer.groups > 1 else (a, b)


def _spread(b, groups):
    """B (out, r/groups) of a grouped convolution as the matrix (out, r) that it is, zero outside its blocks."""
    if groups == 1:
        return b
    width = b.shape[1]
    blocks = b.unflatten(0, (groups, -1))
    return torch.cat([F.pad(blocks[g], (g * width, (groups - 1 - g) * width)) for g in range(groups)])
