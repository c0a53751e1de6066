"""``LoraLayer``: the adapters of one base layer, and what is active, merged and disabled.

A kind of base layer adds ``_make_adapter``, the update of one adapter (``_update``), and how its weight and
factors look as matrices ``W (rows, columns) += lora_b lora_a`` (``_matrices``, ``_matrix_factors``). State dict keys
and attribute names are PEFT's.
"""

import functools
import warnings

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from .. import bare
from ..config import check_alpha, check_dropout, check_rank
from ..errors import PeftWarning
from ..initial import DENSE_INITS, check_init, initialise, reset
from . import dora
from .choice import AdapterChoice
from .merged import MergedWeight
from .mixed import Batch, Rows, by_group, run_lora
from .scaling import Scaling, scaling_buffer


class LoraLayer(AdapterChoice, MergedWeight, nn.Module):
    """A frozen ``base_layer`` and low-rank updates to its weight, by adapter name.

    Attributes:
        lora_A, lora_B, lora_embedding_A, lora_embedding_B, lora_dropout: module or parameter dicts by adapter.
        r, lora_alpha, scaling: dicts of numbers by adapter; ``scaling`` may be assigned to.
        merged_adapters: the adapters that are in the weight now.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora", "use_dora", "lora_bias")
    base_class = nn.Module
    takes = ()  # classes of modules that a user's subclass was registered for
    weight_name = "weight"  # of the parameter of the base layer that the adapters update
    inits = DENSE_INITS  # what ``init_lora_weights`` may be
    has_dropout = has_bias = True
    scaling_factor = 1.0  # on top of lora_alpha / r: for adapters that were trained with a defect of PEFT
    several = False  # whether the weight is a stack of matrices
    stored_transposed = False  # whether the weight is (in_features, out_features)
    _ties = ()  # see layers/tied.py
    _shared = None  # the weight that is kept aside while a copy of it is merged into

    def __init__(self, base_layer):
        bare.start(self)
        if not (self.accepts(base_layer) or isinstance(base_layer, self.takes)):
            raise TypeError(f"base_layer: {type(self).__name__} does not take a {type(base_layer).__name__}")
        if isinstance(base_layer, LazyModuleMixin) and base_layer.has_uninitialized_params():
            raise ValueError(f"base_layer: a {type(base_layer).__name__} has no weight yet; run the model once before")
        # Straight into the dicts: nn.Module's way to set an attribute is most of what wrapping a layer costs.
        own = {
            "lora_dropout": bare.module_dict(),
            "lora_A": bare.module_dict(),
            "lora_B": bare.module_dict(),
            "lora_embedding_A": bare.parameter_dict(),
            "lora_embedding_B": bare.parameter_dict(),
            "lora_magnitude_vector": bare.module_dict(),
        }
        self._modules.update(base_layer=base_layer, **own)
        self.__dict__.update(
            r={}, lora_alpha={}, use_rslora={}, use_dora={}, lora_bias={},
            scaling=Scaling(self._buffers),
            _merged={},  # adapter -> the scaling it was merged with
            _residuals={},  # adapter -> what undoes its exact merge
            _merged_factors={},  # DoRA adapter -> the factors of the rows it was merged with
            _active_adapter=[],
            _disable_adapters=False,
            _rows=Rows(),  # shared by all layers of a model
        )  # fmt: skip
        if not base_layer.training:
            for module in (self, *own.values()):
                module.__dict__["training"] = False
        self._reroute()

    @classmethod
    def accepts(cls, module):
        """Whether this is the LoRA layer for ``module``."""
        return isinstance(module, cls.base_class)

    def unwrap(self):
        """The base layer as it was before; what is merged stays in it."""
        return self.base_layer

    # What is there

    def _get_name(self):
        name = type(self).__name__.removeprefix("Lora")  # as PEFT prints it
        names = {"Conv": type(self._modules["base_layer"]).__name__, "Transposed": "Linear"}
        return "lora." + names.get(name, name)

    def get_base_layer(self):
        """The layer below all adapters."""
        base = self._modules["base_layer"]
        while isinstance(base, LoraLayer):
            base = base._modules["base_layer"]
        return base

    @property
    def weight(self):
        return getattr(self.get_base_layer(), self.weight_name)

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
        active = self._active_adapter
        return [active] if isinstance(active, str) else list(active)

    @property
    def disable_adapters(self):
        return self._disable_adapters

    def adapter_names(self):
        """All adapters of this layer, in the order they came."""
        return list(self.r)

    def _all_available_adapter_names(self):
        return sorted(self.r)

    def adapter_keys(self, adapter_name, r=None):
        """Of an adapter, or of one of rank ``r``: key in a checkpoint -> (key in this layer, shape)."""
        options = {"use_dora": self.use_dora[adapter_name], "lora_bias": self.lora_bias[adapter_name]}
        # Below its r where the factors were taken from a weight that is narrower.
        live = len(self.lora_A[adapter_name].weight) if adapter_name in self.lora_A else self.r[adapter_name]
        return self.checkpoint_keys(self.base_layer, adapter_name, r or live, **options)

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
        use_dora=False,
        lora_bias=False,
        autocast_adapter_dtype=True,
        inference_mode=False,
        device=None,
    ):
        """Adds an adapter; it is active only when its name is among ``active_adapters``.

        Its factors have the dtype of the base weight, or float32 instead of a half-precision dtype
        (``autocast_adapter_dtype``), on the device of the base weight or on ``device``.

        Returns:
            What undoes an ``init_lora_weights`` that changes the base weight (PiSSA, OLoRA): the data that the
            weight had. None otherwise.

        Raises:
            ValueError, TypeError: a name that is taken or unusable, or a number out of range.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.r:
            raise ValueError(f"adapter_name: '{adapter_name}' is taken; adapters here: {list(self.r)}")
        check_rank("r", r)
        check_alpha("lora_alpha", lora_alpha)
        check_dropout(lora_dropout)
        self._check_options(init_lora_weights, r, lora_dropout=lora_dropout, use_dora=use_dora, lora_bias=lora_bias)
        weight = self.weight
        keep = weight.dtype is torch.float64 or (weight.dtype.is_floating_point and not autocast_adapter_dtype)
        dtype = weight.dtype if keep else torch.float32
        device = weight.device if device is None else device
        replaced = None
        try:
            self._make_adapter(adapter_name, r, device, dtype, lora_bias)
            dropout = nn.Dropout(lora_dropout) if lora_dropout else bare.identity()
            self._modules["lora_dropout"]._modules[adapter_name] = dropout
            self._non_persistent_buffers_set.add(scaling_buffer(adapter_name))
            self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
            self.use_rslora[adapter_name] = use_rslora
            self.use_dora[adapter_name], self.lora_bias[adapter_name] = use_dora, lora_bias
            self.scaling.start(adapter_name, self._own_scaling(adapter_name), weight)
            replaced = initialise(self, adapter_name, init_lora_weights)
            if use_dora:
                dora.add(self, adapter_name, device, dtype)
        except BaseException:
            self._drop(adapter_name)
            if replaced is not None:
                weight.data = replaced
            raise
        dropout.__dict__["training"] = self.training
        if inference_mode or adapter_name not in self._active_adapter:
            self.set_requires_grad(adapter_name, False)
        self._reroute()
        return replaced

    def reset_lora_parameters(self, adapter_name, init_lora_weights):
        """Starts an adapter anew: ``init_lora_weights`` is True, "gaussian", or False for no change."""
        check_init(init_lora_weights, self.r[adapter_name], ("gaussian",), type(self.base_layer).__name__)
        initialise(self, adapter_name, init_lora_weights)

    def _check_options(self, init, r, *, lora_dropout, use_dora, lora_bias):
        """ValueError when this kind of layer has no such adapter. More are refused by some kinds."""
        check_init(init, r, self.inits, type(self.base_layer).__name__)
        if use_dora and lora_bias:
            raise ValueError("lora_bias: True is not supported for DoRA, pass use_dora=False")
        if lora_bias and getattr(self.base_layer, "bias", None) is None:
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type {type(self.base_layer).__name__} "
                "has no bias. This means that merging LoRA weights won't be possible.",
                PeftWarning,
                stacklevel=3,
            )

    def delete_adapter(self, adapter_name):
        """Removes an adapter. ValueError when it is unknown or merged."""
        self._known(adapter_name)
        if adapter_name in self._merged:
            raise ValueError(f"adapter_name: '{adapter_name}' is merged; unmerge it before deleting it")
        self._drop(adapter_name)
        self._active_adapter = [n for n in self._active_adapter if n != adapter_name]
        self._reroute()

    def _drop(self, adapter_name):
        for tie in self._ties:
            if tie.adapter_name == adapter_name:
                tie.forget()
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

    # Computing

    def forward(self, x, *args, **kwargs):
        """The output of the base layer with the updates of the active adapters that are not merged."""
        if self._rows.batch is not None or "adapter_names" in kwargs:
            batch = Batch(kwargs.pop("adapter_names")) if "adapter_names" in kwargs else self._rows.batch
            return run_lora(self, batch, x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        dtype = y.dtype
        for name, sign in self._terms:
            y = self.update_rows(name, x, y) if sign > 0 else self._without(name, x, y)
        return y.to(dtype)

    def update_rows(self, name, x, y):
        """``y``, the output of the base layer for the rows ``x``, with the update of one adapter.

        ``y`` may be written to, and what comes back may be float32 where ``y`` is half precision. The rows may
        be a part of a batch: an adapter of this layer changes no row that it is not given.
        """
        if self.use_dora[name]:
            return dora.update_rows(self, name, x, y)
        return self._add(name, self._dropped(name, x), y, self._buffers[scaling_buffer(name)])

    def _without(self, name, x, y):
        """``y`` without the update of an adapter that is in the weight."""
        if name in self._merged_factors:
            return dora.without(self, name, x, y)
        return self._add(name, x, y, -self._merged[name])

    def _forward_rows(self, batch, x, *args, **kwargs):
        """A mixed batch; a kind of layer with an op for it overrides this."""
        return by_group(self, batch, x, *args, **kwargs)

    def _add(self, name, x, y, scale):
        return y + self._update(name, x) * scale

    def _dropped(self, name, x):
        return self.lora_dropout[name](x) if self.has_dropout else x

    def _column(self, vector, y):
        """A value per output feature, in a shape that broadcasts over ``y``."""
        return vector.reshape(-1)

    def _start_factors(self, name):
        return self.lora_A[name].weight, self.lora_B[name].weight

    def _reset(self, name, kind):
        """The factors as a new adapter starts: without effect."""
        reset(*self._start_factors(name), kind, self.r[name])
        if self.lora_bias[name]:
            nn.init.zeros_(self.lora_B[name].bias)

    # What DoRA asks for: the weight as a matrix (out_features, …) whose rows are rescaled

    def magnitude_shape(self):
        """The shape of the magnitudes of a DoRA adapter."""
        return (self.out_features,)

    def _norm_matrix(self):
        return self.weight.detach()

    def _norm_factors(self, name):
        return self._factors(name)

    # The weight as matrices

    def _plain_weight(self):
        """The weight of the base layer, to be written to. ValueError when it is no plain parameter."""
        weight = self.get_base_layer()._parameters.get(self.weight_name)
        if weight.__class__ is not nn.Parameter:
            kind = "computed (parametrized) weight" if weight is None else type(weight).__name__
            raise ValueError(f"{self.weight_name}: a {kind} can not be merged into; expected a plain parameter")
        return weight.detach()

    def _matrices(self):
        """Views of the weight, each of which takes a low-rank update of its own."""
        return [self._plain_weight()]

    def _matrix_factors(self, name):
        """``(lora_a, lora_b)`` of an adapter for each of the matrices."""
        return [self._factors(name)]

    # Kept in step

    def _reroute(self):
        """Decides once what ``forward`` does, after any change of what is active, merged or disabled."""
        state = self.__dict__  # nn.Module's own way to set an attribute costs more than all the rest
        merged, names = state["_merged"], state["_active_adapter"]
        if len(names) == 1 and names[0] in state["r"] and not merged and not state["_disable_adapters"]:
            (name,) = names
            state["_terms"], single = _alone(name)
            state["_single"] = None if state["use_dora"][name] or state["lora_bias"][name] else single
            return
        if state["_disable_adapters"] and not merged:
            state["_terms"], state["_single"] = (), None
            return
        active = [] if state["_disable_adapters"] else [n for n in names if n in state["r"]]
        added = [(name, 1.0) for name in active if name not in merged]
        removed = [(name, -1.0) for name in reversed(merged)] if merged and state["_disable_adapters"] else []
        state["_terms"] = (*added, *removed)
        one = len(added) == 1 and not merged
        one = one and not (state["use_dora"][added[0][0]] or state["lora_bias"][added[0][0]])
        state["_single"] = _alone(added[0][0])[1] if one else None

    def __setattr__(self, name, value):
        if name == "scaling" and not isinstance(value, Scaling):
            self.scaling.update(value)  # a plain dict of numbers; the tensors of the ops must follow
        else:
            super().__setattr__(name, value)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.scaling.refill(self._buffers)
        for tie in self._ties:
            tie.renew()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        self.scaling.buffers = self._buffers


@functools.lru_cache(maxsize=1024)
def _alone(name):
    """What ``forward`` reads where one plain adapter is active: ``_terms`` and ``_single``."""
    return ((name, 1.0),), (name, scaling_buffer(name))


def factor_keys(name, a_shape, b_shape, magnitude_shape, use_dora, lora_bias):
    """Of an adapter in ``lora_A`` and ``lora_B``: key in a checkpoint -> (key in the layer, shape)."""
    keys = {
        "lora_A.weight": (f"lora_A.{name}.weight", a_shape),
        "lora_B.weight": (f"lora_B.{name}.weight", b_shape),
    }
    if lora_bias:
        keys["lora_B.bias"] = (f"lora_B.{name}.bias", b_shape[:1])
    if use_dora:
        keys["lora_magnitude_vector"] = (f"lora_magnitude_vector.{name}.weight", magnitude_shape)
    return keys


def check_adapter_name(name):
    """Names become parts of module paths and of folders."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"adapter_name: expected a non-empty str, got {name!r}")
    if any(c in name for c in "./\\") or name == "__base__":
        raise ValueError(f"adapter_name: expected a name without '.', '/' and '\\', got {name!r}")
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name):
        raise ValueError(f"adapter_name: {name!r} is the name of a method of torch.nn.ModuleDict; choose another")
