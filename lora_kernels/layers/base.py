"""``LoraLayer``: the adapters of one base layer, and what is active, merged and disabled.

A kind of base layer adds ``_make_adapter``, ``forward`` and how its factors look as ``lora_a, lora_b`` of the
weight (``_factors``). State dict keys and attribute names are PEFT's.
"""

import math
import warnings

import torch
from torch import nn

from ..config import check_alpha, check_dropout, check_rank
from .merged import MergedWeight
from .mixed import Rows, by_group
from .scaling import Scaling, scaling_buffer


class LoraLayer(MergedWeight, nn.Module):
    """A frozen ``base_layer`` and low-rank updates to its weight, by adapter name.

    Attributes:
        lora_A, lora_B, lora_embedding_A, lora_embedding_B, lora_dropout: module or parameter dicts by adapter.
        r, lora_alpha, scaling: dicts of numbers by adapter; ``scaling`` may be assigned to.
        merged_adapters: the adapters that are in the weight now.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora")
    base_class = nn.Module

    def __init__(self, base_layer):
        super().__init__()
        if not isinstance(base_layer, self.base_class):
            raise TypeError(f"base_layer: expected {self.base_class.__name__}, got {type(base_layer).__name__}")
        self.base_layer = base_layer
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.r, self.lora_alpha, self.use_rslora = {}, {}, {}
        self.scaling = Scaling(self._buffers)
        self._merged = {}  # adapter -> the scaling it was merged with
        self._residuals = {}  # adapter -> what undoes its exact merge
        self._active_adapter = []
        self._disable_adapters = False
        self._rows = Rows()  # shared by all layers of a model
        self._reroute()
        self.train(base_layer.training)

    # What is there

    def get_base_layer(self):
        """The layer below all adapters."""
        return self.base_layer

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    @property
    def merged(self):
        return bool(self._merged)

    @property
    def merged_adapters(self):
        return list(self._merged)

    @property
    def active_adapter(self):
        return self._active_adapter

    @property
    def active_adapters(self):
        return list(self._active_adapter)

    @property
    def disable_adapters(self):
        return self._disable_adapters

    def adapter_names(self):
        """All adapters of this layer, in the order they came."""
        return list(self.r)

    # Adding and removing

    def update_layer(
        self,
        adapter_name,
        r,
        lora_alpha,
        *,
        lora_dropout=0.0,
        init_lora_weights=True,
        use_rslora=False,
        autocast_adapter_dtype=True,
        inference_mode=False,
        device=None,
    ):
        """Adds an adapter; it is active only when its name is among ``active_adapters``.

        Its factors have the dtype of the base weight, or float32 instead of a half-precision dtype
        (``autocast_adapter_dtype``), on the device of the base weight or on ``device``.

        Raises:
            ValueError, TypeError: a name that is taken or unusable, or a number out of range.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.r:
            raise ValueError(f"adapter_name: '{adapter_name}' is taken; adapters here: {list(self.r)}")
        check_rank("r", r)
        check_alpha("lora_alpha", lora_alpha)
        check_dropout(lora_dropout)
        if init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights: expected True, False or 'gaussian', got {init_lora_weights!r}")
        weight = self.weight
        if weight.dtype == torch.float64:
            raise TypeError("base_layer: expected a weight in float32, float16, bfloat16 or quantised, got float64")
        keep = weight.dtype.is_floating_point and not autocast_adapter_dtype
        dtype = weight.dtype if keep else torch.float32
        device = weight.device if device is None else device
        try:
            self._make_adapter(adapter_name, r, init_lora_weights, device, dtype)
            self.lora_dropout[adapter_name] = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
            self.register_buffer(scaling_buffer(adapter_name), torch.zeros((), device=weight.device), persistent=False)
            self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if use_rslora else r)
            self.use_rslora[adapter_name] = use_rslora
            self.lora_alpha[adapter_name] = lora_alpha
            self.r[adapter_name] = r
        except BaseException:
            self._drop(adapter_name)
            raise
        self.lora_dropout[adapter_name].train(self.training)
        self.set_requires_grad(adapter_name, adapter_name in self._active_adapter and not inference_mode)
        self._reroute()

    def delete_adapter(self, adapter_name):
        """Removes an adapter. ValueError when it is unknown or merged."""
        self._known(adapter_name)
        if adapter_name in self._merged:
            raise ValueError(f"adapter_name: '{adapter_name}' is merged; unmerge it before deleting it")
        self._drop(adapter_name)
        self._active_adapter = [n for n in self._active_adapter if n != adapter_name]
        self._reroute()

    def _drop(self, adapter_name):
        for name in self.adapter_layer_names + self.other_param_names:
            entries = getattr(self, name)
            if adapter_name in entries:
                del entries[adapter_name]
        self._buffers.pop(scaling_buffer(adapter_name), None)
        self._non_persistent_buffers_set.discard(scaling_buffer(adapter_name))
        self._reroute()

    def _known(self, adapter_name):
        if adapter_name not in self.r:
            raise ValueError(f"adapter_name: no adapter '{adapter_name}' here; adapters: {list(self.r)}")

    # Choosing

    def set_adapter(self, adapter_names, inference_mode=False):
        """Makes one adapter (or a list of them) active and trainable, all others inactive and frozen.

        Names that this layer does not have are ignored: an adapter need not touch every layer. A merged layer
        is unmerged first, with a warning.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        if self._merged:
            warnings.warn("set_adapter: the layer is merged; it is unmerged first", stacklevel=2)
            self.unmerge()
        for name in self.r:
            self.set_requires_grad(name, name in names and not inference_mode)
        self._active_adapter = names
        self._reroute()

    def set_requires_grad(self, adapter_names, requires_grad=True):
        """Freezes or unfreezes the factors of the adapters named."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for factor in self._parameters_of(name):
                if factor is not None:
                    factor.requires_grad_(requires_grad)

    def _parameters_of(self, adapter_name):
        for kind in self.adapter_layer_names:
            entries = self._modules[kind]
            if adapter_name in entries._modules:
                yield from entries._modules[adapter_name]._parameters.values()
            elif adapter_name in entries._parameters:
                yield entries._parameters[adapter_name]

    def enable_adapters(self, enabled):
        """Turns the adapters off (the layer then gives what the base layer alone does) or on again."""
        self._disable_adapters = not enabled
        self._reroute()

    def set_scale(self, adapter, scale):
        """Sets the scaling to ``scale`` times the one that ``lora_alpha`` and ``r`` give."""
        self._known(adapter)
        self.scaling[adapter] = scale * self._own_scaling(adapter)

    def scale_layer(self, scale):
        """Multiplies the scaling of the active adapters by ``scale``."""
        for name in self._active_adapter:
            if name in self.r:
                self.scaling[name] = self.scaling[name] * scale

    def unscale_layer(self, scale=None):
        """Divides the scaling of the active adapters by ``scale``, or restores it when None."""
        for name in self._active_adapter:
            if name in self.r:
                self.scaling[name] = self._own_scaling(name) if scale is None else self.scaling[name] / scale

    def _own_scaling(self, name):
        r = self.r[name]
        return self.lora_alpha[name] / (math.sqrt(r) if self.use_rslora[name] else r)

    def _forward_rows(self, batch, x, *args, **kwargs):
        """A mixed batch; a kind of layer with an op for it overrides this."""
        return by_group(self, batch, x, *args, **kwargs)

    # Kept in step

    def _reroute(self):
        """Decides once what ``forward`` does, after any change of what is active, merged or disabled."""
        active = [] if self._disable_adapters else [n for n in self._active_adapter if n in self.r]
        added = [(name, 1.0) for name in active if name not in self._merged]
        removed = [(name, -1.0) for name in self._merged] if self._disable_adapters else []
        self._terms = (*added, *removed)
        one = len(added) == 1 and not self._merged
        self._single = (added[0][0], scaling_buffer(added[0][0])) if one else None

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.scaling.refill(self._buffers)
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        self.scaling.buffers = self._buffers


def check_adapter_name(name):
    """Names become parts of module paths and of folders."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"adapter_name: expected a non-empty str, got {name!r}")
    if any(c in name for c in "./\\") or name == "__base__":
        raise ValueError(f"adapter_name: expected a name without '.', '/' and '\\', got {name!r}")
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name):
        raise ValueError(f"adapter_name: {name!r} is the name of a method of torch.nn.ModuleDict; choose another")
