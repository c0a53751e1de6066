"""``LoraLinear``: ``y = x Wᵀ + bias + Σ scaling · dropout(x) Aᵀ Bᵀ``."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .. import bare, ops
from ..ops.wide import wide
from . import dora
from .base import LoraLayer, factor_keys
from .mixed import Batch, by_group, run_lora
from .scaling import scaling_buffer

_lora_linear = ops.lora_linear
_Linear, _Dropout = nn.Linear, nn.Dropout
_PLAIN = (nn.Parameter, torch.Tensor)  # FSDP shows views of its flat parameter


class LoraLinear(LoraLayer):
    """A linear layer with LoRA adapters; also a drop-in for ``nn.Linear`` on its own (:meth:`from_linear`).

    ``forward``: x (…, in_features) -> (…, out_features), as the base layer.
    """

    base_class = nn.Linear
    _group = None  # of the projections that read the same input, see grouped.py

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.__dict__.update(in_features=base_layer.in_features, out_features=base_layer.out_features)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_name: str = "default",
        *,
        init_lora_weights: bool | str = True,
        autocast_adapter_dtype: bool = True,
    ) -> "LoraLinear":
        """A layer around ``linear`` (shared, and frozen) with one active, trainable adapter.

        Raises:
            ValueError, TypeError: not an ``nn.Linear``, or a number out of range.
        """
        layer = cls(linear)
        layer._active_adapter = [adapter_name]
        layer.update_layer(
            adapter_name,
            r,
            lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        linear.requires_grad_(False)
        return layer

    @classmethod
    def from_peft(cls, peft_layer: nn.Module) -> "LoraLinear":
        """A layer that shares the base layer, the factors and the state of a ``peft`` LoRA linear layer.

        Raises:
            ValueError: a variant (DoRA, ...), a bias on B, or a merged layer whose scaling is not known.
        """
        if not all(hasattr(peft_layer, n) for n in ("lora_A", "lora_B", "scaling", "get_base_layer")):
            raise TypeError(f"peft_layer: expected a peft LoRA layer, got {type(peft_layer).__name__}")
        if getattr(peft_layer, "lora_variant", None) or any(getattr(peft_layer, "lora_bias", {}).values()):
            raise ValueError("peft_layer: variants (DoRA, ...) and lora_bias are not implemented in lora_kernels")
        layer = cls(peft_layer.base_layer)
        layer._active_adapter = list(peft_layer.active_adapters)
        for name, r in peft_layer.r.items():
            dropout = peft_layer.lora_dropout[name]
            rslora = getattr(peft_layer, "use_rslora", {}).get(name, False)
            layer.update_layer(name, r, peft_layer.lora_alpha[name], use_rslora=rslora, device="meta")
            layer.lora_A[name], layer.lora_B[name] = peft_layer.lora_A[name], peft_layer.lora_B[name]
            layer.lora_dropout[name] = dropout
            layer.scaling[name] = peft_layer.scaling[name]
        layer._merged = {name: layer.scaling[name] for name in peft_layer.merged_adapters}
        layer.enable_adapters(not peft_layer.disable_adapters)
        return layer.train(peft_layer.training)

    def to_peft(self) -> nn.Module:
        """The same layer as ``peft`` has it, sharing the base layer and the factors; needs ``peft``.

        Raises:
            ValueError: no adapter, one with DoRA or ``lora_bias``, or one that was scaled after it was merged.
        """
        from peft import LoraConfig
        from peft.tuners.lora import Linear

        for name in self.r:
            if self.use_dora[name] or self.lora_bias[name]:
                raise ValueError(f"to_peft: adapter '{name}' has DoRA or lora_bias; only plain adapters are converted")
            if self._merged.get(name, self.scaling[name]) != self.scaling[name]:
                raise ValueError(f"to_peft: adapter '{name}' was scaled after it was merged; unmerge it first")
        trainable = [(p, p.requires_grad) for p in self.parameters()]
        layer = None
        for name, r in self.r.items():
            values = {"r": r, "lora_alpha": self.lora_alpha[name], "use_rslora": self.use_rslora[name]}
            config = LoraConfig(lora_dropout=getattr(self.lora_dropout[name], "p", 0.0), **values)
            if layer is None:
                layer = Linear(self.base_layer, name, config=config, r=r, lora_alpha=self.lora_alpha[name])
            else:
                layer.update_layer(name, r, lora_alpha=self.lora_alpha[name], config=config)
            layer.lora_A[name], layer.lora_B[name] = self.lora_A[name], self.lora_B[name]
            layer.scaling[name] = self.scaling[name]
        if layer is None:
            raise ValueError("to_peft: the layer has no adapter")
        layer.set_adapter(self.active_adapters)
        layer._disable_adapters = self._disable_adapters
        layer.merged_adapters = list(self._merged)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        return layer.train(self.training)

    def _make_adapter(self, name, r, device, dtype, bias):
        a = bare.linear(self.in_features, r, False, device, dtype)
        b = bare.linear(r, self.out_features, bias, device, dtype)
        self._modules["lora_A"]._modules[name], self._modules["lora_B"]._modules[name] = a, b

    @staticmethod
    def checkpoint_keys(base, name, r, *, use_dora=False, lora_bias=False):
        """Of an adapter: key in a checkpoint -> (key in this layer, shape)."""
        return factor_keys(
            name, (r, base.in_features), (base.out_features, r), (base.out_features,), use_dora, lora_bias
        )

    def _factors(self, name):
        modules = self._modules
        return modules["lora_A"]._modules[name].weight, modules["lora_B"]._modules[name].weight

    def supports_lora_conversion(self, adapter_name="default"):
        return not self.use_dora.get(adapter_name, False)

    def forward(self, x, *args, **kwargs):
        if self._rows.batch is not None:
            return run_lora(self, self._rows.batch, x, *args, **kwargs)
        if not (self._terms or args or kwargs):
            return self._forward_base(x)
        plain = None if args or kwargs else self._plain()
        if plain is None:
            return self._forward_terms(x, *args, **kwargs)
        if self._group is not None:
            y = self._group.output(self, x, plain)
            if y is not None:
                return y
        weight, bias, a, b, scaling, p = plain
        return _lora_linear(x, weight, bias, a, b, scaling, dropout_p=p)

    def _forward_base(self, x):
        """No adapter takes part: what the base layer gives, without the cost of calling a module where it is plain."""
        base = self._modules["base_layer"]
        if base.__class__ is _Linear and _unhooked(base):
            parameters = base._parameters
            weight = parameters.get("weight")
            if weight is not None:
                return F.linear(x, weight, parameters["bias"])
        return base(x)

    def _plain(self, single=None):
        """(weight, bias, A, B, scaling, probability of dropout) where one op computes the layer, None where not.

        ``single``: the adapter and the name of its scaling; the one that is active alone and plain by default.
        """
        # Everything is read where it lives, at each call: no copy can be stale after .to(), an assigned
        # parameter or a replaced module. Only the choice of adapter is kept (_reroute).
        single, modules = single or self._single, self._modules
        base = modules["base_layer"]
        if single is None:
            return None
        name, scale = single
        if name in self.scaling.zeros:  # the base layer's own bits, which our kernels need not give
            return None
        a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        if not (base.__class__ is a.__class__ is b.__class__ is _Linear and _unhooked(base, a, b, dropout)):
            return None
        a, b = a._parameters.get("weight"), b._parameters.get("weight")
        parameters = base._parameters
        weight = parameters.get("weight")
        if weight.__class__ not in _PLAIN or a is None or b is None:
            return None
        dtype = a.dtype
        if (dtype is not weight.dtype and dtype is not torch.float32) or b.dtype is not dtype:
            return None
        p = 0.0
        if self.training:
            if dropout.__class__ is _Dropout:
                p = dropout.p if dropout.training else 0.0
            elif dropout.__class__ is not nn.Identity:
                return None
        return weight, parameters["bias"], a, b, self._buffers[scale], p

    def _forward_rows(self, batch, x, *args, **kwargs):
        modules = self._modules
        base = modules["base_layer"]
        present = batch.present(self.r)
        if not present:
            return base(x, *args, **kwargs)
        weight = base._parameters.get("weight")
        plain = base.__class__ is _Linear and weight.__class__ in _PLAIN and not args and not kwargs
        if not plain or not _unhooked(base):
            return by_group(self, batch, x, *args, **kwargs)
        all_a, all_b, dtype = modules["lora_A"]._modules, modules["lora_B"]._modules, None
        lora_a, lora_b, values = [], [], []
        for name in present:
            a, b = all_a[name], all_b[name]
            if not (_read_only(a) and _read_only(b)):
                return by_group(self, batch, x)
            a, b = a._parameters.get("weight"), b._parameters.get("weight")
            if a is None or b is None or self.lora_bias[name] or self.use_dora[name]:
                return by_group(self, batch, x)
            dtype = a.dtype if dtype is None else dtype
            if a.dtype is not dtype or b.dtype is not dtype:
                return by_group(self, batch, x)
            lora_a.append(a)
            lora_b.append(b)
            values.append(self.scaling[name])
        if dtype is not weight.dtype and dtype is not torch.float32:
            return by_group(self, batch, x)
        scalings = batch.scalings(tuple(values), weight)
        return ops.multi_lora_linear(
            x, weight, base._parameters["bias"], lora_a, lora_b, scalings, batch.plan(x, present)
        )

    def _forward_terms(self, x, *args, **kwargs):
        """Any base layer, any number of adapters: the base product by its own module, then the updates."""
        if "adapter_names" in kwargs:
            return run_lora(self, Batch(kwargs.pop("adapter_names")), x, *args, **kwargs)
        one = self._terms[0][0] if len(self._terms) == 1 and not (args or kwargs or self._merged) else None
        if one is not None and self.use_dora[one]:
            plain = self._plain((one, scaling_buffer(one)))
            if plain is not None and (not self.training or isinstance(self.lora_dropout[one], nn.Identity)):
                return self._forward_dora(x, one, *plain[:5])
        base = self.base_layer
        y = base(x, *args, **kwargs)
        if not self._terms:
            return y
        if not _unhooked(base) or type(base).forward is not _Linear.forward:
            y = y.clone()  # others may hold the output
        dtype = y.dtype
        for name, sign in self._terms:
            y = self.update_rows(name, x, y) if sign > 0 else self._without(name, x, y)
        return y if y.dtype is dtype else y.to(dtype)

    def _forward_dora(self, x, name, weight, bias, a, b, scaling):
        """One DoRA adapter over a plain layer: base product and update in one op, then the rows' factors."""
        z, c = _lora_linear(x, weight, bias, a, b, scaling), dora.row_factors(self, name)
        # c · (z - bias) + bias; where nothing is trained yet c is 1, and this z bit for bit
        return (z * c if bias is None else z + (wide(z) - bias) * (c - 1)).to(z.dtype)

    def update_rows(self, name, x, y):
        a, b = self.lora_A[name], self.lora_B[name]
        if not (self.use_dora[name] or (_read_only(a) and _read_only(b))):
            dtype = a.weight.dtype  # which its hooks may widen
            dtype = torch.promote_types(dtype, x.dtype) if a._forward_pre_hooks else dtype
            return y + b(a(self._dropped(name, x).to(dtype))) * self._buffers[scaling_buffer(name)]
        dropout = self.lora_dropout[name]
        if self.use_dora[name] or not (isinstance(dropout, _Dropout) and dropout.training and _unhooked(dropout)):
            return super().update_rows(name, x, y)
        return self._add(name, x, y, self._buffers[scaling_buffer(name)], dropout.p)

    def _add(self, name, x, y, scale, p=0.0):
        if x.dtype != y.dtype and y.dtype != torch.float32:
            x = x.to(y.dtype)
        a, b = (f if f.dtype in (x.dtype, torch.float32) else f.float() for f in self._factors(name))
        y = ops.lora_add_(y, x, a, b, scale, dropout_p=p)
        if self.lora_bias[name]:
            y = y + (self.lora_B[name].bias * scale).to(y.dtype)
        return y

    def _update(self, name, x):
        a, b = self._factors(name)
        return F.linear(F.linear(x.to(a.dtype), a), b, self.lora_B[name].bias)

    def _base_product(self, x):
        weight = self.weight
        return F.linear(x.to(weight.dtype), weight)


def _read_only(factor):
    """Whether a factor's weight is all that counts: nothing happens when the module is called."""
    return factor.__class__ is _Linear and _unhooked(factor)


def _unhooked(*modules):
    """Whether nobody listens to the modules' own forward, or took its place (torch's graph transforms)."""
    if _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks:
        return False
    for module in modules:
        own = module.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return False
    return True
