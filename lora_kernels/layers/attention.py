"""``LoraAttention``: ``nn.MultiheadAttention``, whose projections are parameters that no module is called for."""

import contextlib

import torch
from torch import nn

from .. import bare
from ..initial import PLAIN_INITS
from ..ops.wide import wide
from .base import LoraLayer, factor_keys
from .linear import LoraLinear
from .scaling import scaling_buffer
from .turn import in_turn


class LoraAttention(LoraLayer):
    """An ``nn.MultiheadAttention`` with adapters on ``in_proj_weight`` and on ``out_proj``; ``forward`` as there.

    The base layer computes with updated copies of the two weights, made for the call; its own are only read (PEFT
    merges and unmerges them at each call: they drift, and the update of ``out_proj`` counts twice). LoRA dropout does
    not apply, as in PEFT: there is no input of the update alone.

    ``base_layer.out_proj`` is a LoRA layer of its own, for scaling and merging; adapters come and go together.
    """

    base_class = nn.MultiheadAttention
    inits = PLAIN_INITS
    weight_name = "in_proj_weight"
    has_dropout = False

    def __init__(self, base_layer):
        super().__init__(base_layer)
        if not base_layer._qkv_same_embed_dim:
            raise ValueError("Only same embed for query/key/value is supported as of now for MultiheadAttention.")
        self.in_features, self.out_features = base_layer.embed_dim, 3 * base_layer.embed_dim
        base_layer.out_proj = LoraLinear(base_layer.out_proj)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)  # embed_dim, batch_first, in_proj_bias, …: others read them

    def _get_name(self):
        return "lora.MultiheadAttention"

    @property
    def out_proj(self):
        """The base projection, as it was before."""
        return self.base_layer.out_proj.get_base_layer()

    def unwrap(self):
        base = super().unwrap()
        base.out_proj = getattr(base.out_proj, "base_layer", base.out_proj)
        return base

    # Adapters of both weights come and go together

    def _check_options(self, init, r, *, lora_dropout, use_dora, lora_bias):
        if use_dora:
            raise ValueError("MultiheadAttention does not support DoRA (yet), please set use_dora to False")
        if lora_bias:
            raise ValueError("MultiheadAttention does not support lora_bias (yet), please set lora_bias to False")
        super()._check_options(init, r, lora_dropout=lora_dropout, use_dora=False, lora_bias=False)

    def update_layer(self, adapter_name, r, lora_alpha, **options):
        """Adds an adapter to both weights; arguments as :meth:`LoraLayer.update_layer`."""
        super().update_layer(adapter_name, r, lora_alpha, **options)
        out_proj = self.base_layer.out_proj
        out_proj._active_adapter = list(self._active_adapter)
        out_proj.enable_adapters(not self._disable_adapters)
        try:
            out_proj.update_layer(adapter_name, r, lora_alpha, **options)
        except BaseException:
            self._drop(adapter_name)
            raise

    def _drop(self, adapter_name):
        super()._drop(adapter_name)
        self.base_layer.out_proj._drop(adapter_name)

    def set_adapter(self, adapter_names, inference_mode=False):
        """As :meth:`LoraLayer.set_adapter`, for both weights."""
        super().set_adapter(adapter_names, inference_mode)
        self.base_layer.out_proj.set_adapter(adapter_names, inference_mode)

    def set_requires_grad(self, adapter_names, requires_grad=True):
        """Freezes or unfreezes the factors of the adapters named, of both weights."""
        super().set_requires_grad(adapter_names, requires_grad)
        out_proj = self.base_layer.out_proj
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        out_proj.set_requires_grad([name for name in names if name in out_proj.r], requires_grad)

    def enable_adapters(self, enabled):
        """Turns the adapters of both weights off or on."""
        super().enable_adapters(enabled)
        self.base_layer.out_proj.enable_adapters(enabled)

    def _make_adapter(self, name, r, device, dtype, bias):
        a = bare.linear(self.in_features, r, False, device, dtype)
        b = bare.linear(r, self.out_features, False, device, dtype)
        self._modules["lora_A"]._modules[name], self._modules["lora_B"]._modules[name] = a, b

    @staticmethod
    def checkpoint_keys(base, name, r, *, use_dora=False, lora_bias=False):
        """Of an adapter: key in a checkpoint -> (key in this layer, shape)."""
        size = base.embed_dim
        keys = factor_keys(name, (r, size), (3 * size, r), None, False, False)
        out = factor_keys(name, (r, size), (size, r), None, False, False)
        inner = "base_layer.out_proj."
        return keys | {inner + key: (inner + own, shape) for key, (own, shape) in out.items()}

    def _factors(self, name):
        return self.lora_A[name].weight, self.lora_B[name].weight

    # Computing

    def forward(self, query, *args, **kwargs):
        base = self.base_layer
        if self._rows.batch is not None or "adapter_names" in kwargs:
            raise TypeError("lora.MultiheadAttention does not support mixed adapter batches.")
        changed = {"in_proj_weight": self, "out_proj.base_layer.weight": base.out_proj}
        changed = {name: layer for name, layer in changed.items() if layer._terms}
        if not changed:
            return base(query, *args, **kwargs)
        with in_turn(base):  # reading the weights, too: another thread may have put its own there
            weights = {name: updated_weight(layer) for name, layer in changed.items()}
            with _found(base, weights):
                return torch.func.functional_call(base, weights, (query, *args), kwargs)


@contextlib.contextmanager
def _found(module, names):
    """In this context the parameters ``names`` are what their modules give.

    FSDP has views of its flat parameter as attributes beside the parameters, which are looked up first.
    """
    aside = []
    for name in names:
        path, _, own = name.rpartition(".")
        attributes = module.get_submodule(path).__dict__
        if own in attributes:
            aside.append((attributes, own, attributes.pop(own)))
    try:
        yield
    finally:
        for attributes, own, value in aside:
            attributes[own] = value


def updated_weight(layer):
    """A copy of the weight with the updates that ``forward`` adds, differentiable.

    Added in float32 (float64 of a float64 weight) and rounded once.
    """
    weight = layer.weight
    total = wide(weight)
    for name, sign in layer._terms:
        a, b = layer._factors(name)
        scale = layer._buffers[scaling_buffer(name)] if sign > 0 else -layer._merged[name]
        total = torch.addmm(total, b.to(total.dtype) * scale, a.to(total.dtype))
    return total.to(weight.dtype)
