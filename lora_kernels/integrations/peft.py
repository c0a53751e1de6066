"""``peft``'s ``lora.Linear`` with our kernels below it: a subclass that a live layer is turned into and back.

Only the class of the instance changes, so parameters, names, hooks and all that PEFT keeps in a layer stay where
they are. Nothing is remembered between calls: PEFT changes a layer in a dozen places, and what it says is read
each time. Whatever is not plain LoRA goes to PEFT's own forward.
"""

import functools

import torch
from torch import nn

try:
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.mixed import MixedModel
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as error:
    raise ImportError("accelerate, restore: need `peft`: pip install peft") from error

from .. import ops
from ..layers.linear import _unhooked
from ..ops.linear.api import autocast_dtype
from .measure import measure
from .report import Group, Report

_Linear, _Dropout, _Identity, _Parameter = nn.Linear, nn.Dropout, nn.Identity, nn.Parameter
_PLAIN_TENSORS = frozenset({torch.Tensor, nn.Parameter})
_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_STATE = ("lora_variant", "merged_adapters", "_disable_adapters", "_active_adapter", "cast_input_dtype_enabled")
_scales = {}


class Linear(PeftLinear):
    """``peft.tuners.lora.Linear`` that computes plain LoRA in one op. It has PEFT's name, as reports print it."""

    def forward(self, x, *args, **kwargs):
        if args or kwargs or self.merged_adapters or not self.cast_input_dtype_enabled:
            return self._forward_special(x, *args, **kwargs)
        modules = self._modules
        base, adapters = modules["base_layer"], modules["lora_A"]._modules
        active = self._active_adapter
        if active.__class__ is str:
            active = (active,)
        names = [name for name in active if name in adapters]
        if self._disable_adapters or not names:
            return base(x)
        weight = _plain_weight(base, x)
        # Dynamo gets the gradient of lora_add_ wrong where y is a view: several adapters are PEFT's there.
        if weight is None or (len(names) > 1 and torch.compiler.is_compiling()):
            return PeftLinear.forward(self, x)
        terms = [_term(self, name, weight, x) for name in names]
        if None in terms:
            return PeftLinear.forward(self, x)
        a, b, scaling, p = terms[0]
        y = ops.lora_linear(x, weight, base._parameters["bias"], a, b, scaling, dropout_p=p)
        for a, b, scaling, p in terms[1:]:
            y = ops.lora_add_(y, x if x.dtype is y.dtype else x.to(y.dtype), a, b, scaling, dropout_p=p)
        return y

    def _forward_special(self, x, *args, **kwargs):
        """Arguments beside x, a merged layer, no casting of x: one adapter a row may be ours, the rest is PEFT's."""
        y = None
        if not args and kwargs.keys() == {"adapter_names"} and kwargs["adapter_names"] is not None:
            y = self._forward_rows(x, kwargs["adapter_names"])
        return PeftLinear.forward(self, x, *args, **kwargs) if y is None else y

    def _forward_rows(self, x, adapter_names):
        """One adapter a row of the batch, in one op; None where PEFT has to do it, or to refuse it."""
        base = self._modules["base_layer"]
        weight = _plain_weight(base, x)
        blocked = self._disable_adapters or self.merged_adapters or not self.cast_input_dtype_enabled
        if weight is None or blocked or torch.compiler.is_compiling():
            return None
        if x.dim() < 2 or not x.numel() or len(adapter_names) != x.shape[0]:
            return None
        slots, terms = {}, []
        for name in dict.fromkeys(adapter_names):
            slots[name] = -1
            if name != "__base__" and name in self._modules["lora_A"]._modules:
                term = _term(self, name, weight, x)
                if term is None or term[3] or term[2].__class__ is not torch.Tensor:
                    return None
                slots[name] = len(terms)
                terms.append(term)
        if not terms:
            return base(x)
        a, b, scalings, _ = zip(*terms, strict=True)
        rows_each = x.numel() // (x.shape[0] * x.shape[-1])
        plan = _plan(tuple([slots[name] for name in adapter_names]), rows_each, len(terms), x.device)
        scalings = torch.stack([scaling.to(x.device, torch.float32) for scaling in scalings])
        return ops.multi_lora_linear(x, weight, base._parameters["bias"], list(a), list(b), scalings, plan)


def _plain_weight(base, x):
    """The weight of a base layer that our ops can compute with ``x`` as the module would; None otherwise."""
    if base.__class__ is not _Linear or not _unhooked(base) or x.__class__ not in _PLAIN_TENSORS:
        return None
    weight = base._parameters.get("weight")
    if weight.__class__ is not _Parameter or weight.dtype not in _DTYPES:
        return None
    if x.dtype is not weight.dtype and (x.dtype not in _DTYPES or autocast_dtype(x.device.type) is None):
        return None
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return None
    return weight


def _term(layer, name, weight, x):
    """``(lora_a, lora_b, scaling, dropout_p)`` of an adapter; None where it is not plain LoRA."""
    modules = layer._modules
    a = modules["lora_A"]._modules[name]
    b = modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    if name in layer.lora_variant or a.__class__ is not _Linear or b.__class__ is not _Linear:
        return None
    p = 0.0
    if dropout.__class__ is _Dropout:
        p = dropout.p if dropout.training else 0.0
    elif dropout.__class__ is not _Identity:
        return None
    if not (p < 1.0 and _unhooked(a) and _unhooked(b) and _unhooked(dropout)):
        return None
    if a._parameters["bias"] is not None or b._parameters["bias"] is not None:
        return None
    a, b = a._parameters.get("weight"), b._parameters.get("weight")
    if a.__class__ is not _Parameter or b.__class__ is not _Parameter or a.dtype is not b.dtype:
        return None
    if a.dtype is not torch.float32 and (a.dtype is not weight.dtype or autocast_dtype(x.device.type) is not None):
        return None
    scaling = layer.scaling[name]
    if isinstance(scaling, torch.Tensor):
        if scaling.dim() or scaling.requires_grad:
            return None
    elif not torch.compiler.is_compiling():
        scaling = _scales.get((scaling, x.device)) or _scale(scaling, x.device)
    return a, b, scaling, p


def _scale(value, device):
    """The float as the 0-d tensor that ops take. One a value, never written: it can not go stale."""
    with torch.inference_mode(False):
        scaling = torch.full((), float(value), dtype=torch.float32, device=device)
    if len(_scales) >= 1024:
        _scales.clear()
    _scales[value, device] = scaling
    return scaling


@functools.lru_cache(maxsize=16)
def _plan(slots, rows_each, num_slots, device):
    """The plan of a batch whose item ``i``, of ``rows_each`` rows, has slot ``slots[i]``: one for all layers."""
    with torch.inference_mode(False):
        rows = torch.tensor(slots, dtype=torch.int32).repeat_interleave(rows_each).to(device)
        return ops.plan_batch(rows, num_slots=num_slots)


def accelerate(model, sample=None):
    """See :func:`lora_kernels.accelerate`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError("model: expected a model with adapters made by peft, found no layer of peft in it")
    mixed = {id(part) for m in model.modules() if isinstance(m, MixedModel) for part in m.modules()}
    groups, turned = {}, []
    for name, layer in layers:
        reason = "part of a PeftMixedModel" if id(layer) in mixed else _why_left(layer)
        key = (_describe(layer), reason, None if reason else _remark(layer))
        group = groups.setdefault(key, Group(*key))
        group.names.append(name)
        group.layers.append(layer)
        if reason is None and type(layer) is PeftLinear:
            layer.__class__ = Linear
            turned.append(layer)
    ours = [group for group in groups.values() if group.reason is None]
    if sample is not None and ours:
        try:
            measure(model, sample, ours, PeftLinear, Linear)
        except BaseException:
            for group in ours:
                _set_class(group.layers, Linear)
            _set_class(turned, PeftLinear)
            raise
    for group in groups.values():
        group.layers.clear()
    return Report(list(groups.values()), measured=sample is not None)


def restore(model):
    """See :func:`lora_kernels.restore`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    layers = [module for module in model.modules() if type(module) is Linear]
    _set_class(layers, PeftLinear)
    return len(layers)


def _set_class(layers, cls):
    for layer in layers:
        layer.__class__ = cls


def _why_left(layer):
    """Why a layer of PEFT stays as it is; None when it is replaced."""
    if not isinstance(layer, LoraLayer):
        return "another method than LoRA"
    if type(layer) not in (PeftLinear, Linear):
        return f"no faster kernel for lora.{type(layer).__name__}"
    if "forward" in layer.__dict__:
        return "its forward is replaced by another library"
    if not all(hasattr(layer, name) for name in _STATE):
        return "made by a peft that is too old"
    base = layer.base_layer
    if type(base) is not nn.Linear:
        return f"its base layer is a {type(base).__module__}.{type(base).__name__}"
    weight = base._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return "its base weight is not a plain parameter"
    if weight.dtype not in _DTYPES:
        return f"no kernel for a base weight in {weight.dtype}"
    if not _unhooked(base):
        return "its base layer has hooks"
    reasons = [_why_not(layer, name) for name in layer.lora_A]
    return None if not reasons or None in reasons else "; ".join(sorted(set(reasons)))


def _why_not(layer, name):
    """Why an adapter of a layer is not served; None when it is."""
    if name in layer.lora_variant:
        return f"variant {type(layer.lora_variant[name]).__name__}"
    if layer.lora_B[name].bias is not None:
        return "a bias on lora_B"
    parts = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if not all(_unhooked(part) for part in parts):
        return "hooks on lora_A, lora_B or lora_dropout"
    plain = {(_Linear, _Linear, _Dropout), (_Linear, _Linear, _Identity)}
    if tuple(type(part) for part in parts) not in plain:
        return f"adapter made of {', '.join(type(part).__name__ for part in parts)}"
    if parts[0].weight.dtype not in (torch.float32, layer.base_layer.weight.dtype):
        return f"adapter in {parts[0].weight.dtype} over a base in {layer.base_layer.weight.dtype}"
    return None


def _remark(layer):
    """What of a replaced layer runs PEFT's own forward at present, or None."""
    remarks = [f"{name}: {reason}" for name in layer.lora_A if (reason := _why_not(layer, name))]
    if layer.merged_adapters:
        remarks.append("merged now")
    return "PEFT's own forward for " + ", ".join(remarks) if remarks else None


def _describe(layer):
    """What layers of one group share: kind, shape, ranks and dtypes."""
    kind = ("lora." if isinstance(layer, LoraLayer) else "") + type(layer).__name__
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    shape = " {} -> {}".format(*sizes) if None not in sizes else ""
    ranks = sorted(set(layer.r.values())) if isinstance(layer, LoraLayer) else ()
    text = kind + shape + (f", r = {', '.join(map(str, ranks))}" if ranks else "")
    weight = getattr(layer.get_base_layer(), "weight", None)
    return text if weight is None else f"{text}, {str(weight.dtype).removeprefix('torch.')}"
