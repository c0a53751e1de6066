"""``accelerate`` and ``restore``: which layers of a ``peft`` model are turned into ours, and why others are not."""

from torch import nn

try:
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.lora.model import LoraModel as PeftLoraModel
    from peft.tuners.mixed import MixedModel
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as error:
    raise ImportError("accelerate, restore: need `peft`: pip install peft") from error

import torch

from ..layers.linear import _unhooked
from .measure import measure
from .peft_layers import CLASSES, Linear, PeftLinear
from .peft_merge import LoraModel
from .peft_routed import PeftQuantised, routed, why_not_quantised
from .peft_terms import DTYPES, FACTORS, activated, dora_magnitude, served_variant
from .report import Group, Report

__all__ = ["Linear", "accelerate", "restore"]

_OURS = {**CLASSES, PeftLoraModel: LoraModel}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_STATE = ("lora_variant", "merged_adapters", "_disable_adapters", "_active_adapter", "cast_input_dtype_enabled")


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
        if reason is None and type(layer) in CLASSES:
            _turn([layer], True)
            turned.append(layer)
    turned += _turn([m for m in model.modules() if type(m) is PeftLoraModel and id(m) not in mixed], True)
    ours = [group for group in groups.values() if group.reason is None]
    if sample is not None and ours:
        try:
            measure(model, sample, ours, _turn)
        except BaseException:
            for group in ours:
                _turn(group.layers, True)
            _turn(turned, False)
            raise
    for group in groups.values():
        group.layers.clear()
    return Report(list(groups.values()), measured=sample is not None)


def restore(model):
    """See :func:`lora_kernels.restore`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _turn([module for module in model.modules() if type(module) is LoraModel], False)
    return len(_turn([module for module in model.modules() if type(module) in _THEIRS], False))


def _turn(modules, ours):
    """Gives modules our class, or PEFT's; returns them."""
    for module in modules:
        module.__class__ = (_OURS if ours else _THEIRS).get(type(module), type(module))
    return modules


def _why_left(layer):
    """Why a layer of PEFT stays as it is; None when it is replaced."""
    if not isinstance(layer, LoraLayer):
        return "another method than LoRA"
    if type(layer) not in CLASSES and type(layer) not in _THEIRS:
        return f"no faster kernel for lora.{type(layer).__name__}"
    if "forward" in layer.__dict__:
        return "its forward is replaced by another library"
    if not all(hasattr(layer, name) for name in _STATE):
        return "made by a peft that is too old"
    if isinstance(layer, ParamWrapper):
        return _why_not_parameter(layer)
    if isinstance(layer, PeftQuantised):
        return _why_none(why_not_quantised(layer, name) for name in layer.r)
    base = layer.base_layer
    kinds = _BASES[type(layer).__name__]
    if type(base).__name__ not in kinds or type(base).__module__.partition(".")[0] not in ("torch", "transformers"):
        return f"its base layer is a {type(base).__module__}.{type(base).__name__}"
    weight = base._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return "its base weight is not a plain parameter"
    if weight.dtype not in DTYPES:
        return f"no kernel for a base weight in {weight.dtype}"
    if not _unhooked(base):
        return "its base layer has hooks"
    return _why_none(_why_not(layer, name) for name in layer.r)


def _why_none(reasons):
    """Why no adapter of a layer is served, of the reasons for each; None when one is."""
    reasons = set(reasons)
    return None if not reasons or None in reasons else "; ".join(sorted(reasons))


def _why_not_parameter(layer):
    if not hasattr(layer, "_did_swap_in_out_features"):
        return "made by a peft that is too old"
    weight = layer.get_base_layer()._parameters.get(layer.parameter_name)
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return "its parameter is not a plain one"
    return None if weight.dtype in DTYPES else f"no kernel for a parameter in {weight.dtype}"


_BASES = {
    "Linear": ("Linear", "Conv1D"),
    "Embedding": ("Embedding",),
    **{f"Conv{n}d": (f"Conv{n}d",) for n in (1, 2, 3)},
}


def _why_not(layer, name):
    """Why an adapter of a layer is not served; None when it is."""
    if isinstance(layer, PeftQuantised):
        return why_not_quantised(layer, name)
    variant = layer.lora_variant.get(name)
    linear = isinstance(layer, PeftLinear)
    served = linear and variant is not None and served_variant(layer, name, variant, training=False)
    known = linear and (dora_magnitude(layer, name) is not None or activated(layer, name) or routed(layer, name))
    if variant is not None and not served and not known:
        return f"variant {type(variant).__name__}"
    if not linear:
        return None
    parts = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if not all(_unhooked(part) for part in parts):
        return "hooks on lora_A, lora_B or lora_dropout"
    if type(parts[0]) not in FACTORS or type(parts[1]) not in FACTORS or type(parts[2]) not in _DROPOUTS:
        return f"adapter made of {', '.join(type(part).__name__ for part in parts)}"
    if parts[0].weight.dtype not in (torch.float32, layer.base_layer.weight.dtype):
        return f"adapter in {parts[0].weight.dtype} over a base in {layer.base_layer.weight.dtype}"
    return None


def _at_inference(layer, name):
    """Whether an adapter is ours at inference alone."""
    variant = layer.lora_variant[name]
    if not isinstance(layer, PeftLinear) or _why_not(layer, name):
        return False
    if activated(layer, name):
        return True
    known = dora_magnitude(layer, name) is not None or routed(layer, name)
    return not known and not served_variant(layer, name, variant, training=True)


_DROPOUTS = (nn.Dropout, nn.Identity)


def _remark(layer):
    """What of a replaced layer runs PEFT's own forward at present, or None."""
    remarks = [f"{name}: {reason}" for name in layer.r if (reason := _why_not(layer, name))]
    remarks += [f"{name} in training" for name in layer.r if name in layer.lora_variant and _at_inference(layer, name)]
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
