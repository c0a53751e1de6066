"""What an adapter of a ``peft`` layer is to our ops: ``(lora_a, lora_b, scaling, dropout_p)``, or None.

Nothing is remembered between calls: PEFT changes a layer in a dozen places, and what it says is read each time.
None means that the layer is in a state that only PEFT's own code knows.
"""

import functools

import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora import variants
from torch import nn

from .. import ops
from ..layers.linear import _unhooked
from ..ops.linear.api import autocast_dtype

_Linear, _Dropout, _Identity = nn.Linear, nn.Dropout, nn.Identity
PLAIN_TENSORS = frozenset({torch.Tensor, nn.Parameter})
DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_scales = {}


def variants_of(*names):
    """Classes of PEFT's variants, those that this peft has."""
    return tuple(getattr(variants, name) for name in names if hasattr(variants, name))


# Variants whose forward is that of plain LoRA: always, unless the layer trains, with a diagonal in between.
_PLAIN_VARIANTS = variants_of("MiCALinearVariant", "BdLoraLinearVariant")
_PLAIN_IN_EVAL = variants_of("VeloraLinearVariant", "MontecloraLinearVariant")
_KASA = variants_of("KasaLinearVariant")
_DORA = variants_of("DoraLinearVariant")
_ALORA = variants_of("ALoraLinearVariant")
FACTORS = frozenset({nn.Linear, *variants_of("BlockDiagonalLinear")})  # the modules that A and B may be


def plain_weight(base, x):
    """The weight of a base layer that our ops can compute with ``x`` as the module would; None otherwise."""
    if base.__class__ is not _Linear or not _unhooked(base) or x.__class__ not in PLAIN_TENSORS:
        return None
    weight = base._parameters.get("weight")
    if weight.__class__ not in PLAIN_TENSORS or weight.dtype not in DTYPES:
        return None
    return weight if usable(x, weight.dtype) else None


def usable(x, dtype):
    """Whether our ops compute with ``x`` over a base of ``dtype`` what the module would."""
    if x.dtype is not dtype and (x.dtype not in DTYPES or autocast_dtype(x.device.type) is None):
        return False
    return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()


def activated(layer, name):
    """Whether an adapter is an aLoRA: plain LoRA on the rows from its invocation on."""
    return isinstance(layer.lora_variant.get(name), _ALORA)


def term(layer, name, dtype, x, any_variant=False, any_bias=False):
    """``(lora_a, lora_b, scaling, dropout_p)`` of an adapter over a base of ``dtype``; None: not plain LoRA.

    ``any_variant``: those of a DoRA or aLoRA adapter, of which the caller does what is not plain. ``any_bias``: also
    where B has a bias, which the caller adds (:func:`with_biases`).
    """
    modules = layer._modules
    a = modules["lora_A"]._modules[name]
    b = modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    variant = layer.lora_variant.get(name) if layer.lora_variant else None
    if variant is not None and not (any_variant or served_variant(layer, name, variant, layer.training)):
        return None
    p = 0.0
    if dropout.__class__ is _Dropout:
        p = dropout.p if dropout.training else 0.0
    elif dropout.__class__ is not _Identity:
        return None
    if not (p < 1.0 and _unhooked(a) and _unhooked(b) and _unhooked(dropout)):
        return None
    own = b._parameters.get("bias")
    if a._parameters.get("bias") is not None or (own is not None and not any_bias):
        return None
    a, b = _factor(a), _factor(b)
    if a is None or b is None or a.dtype is not b.dtype:
        return None
    if a.dtype is not torch.float32 and (a.dtype is not dtype or autocast_dtype(x.device.type) is not None):
        return None
    scaling = scale(layer.scaling[name], x.device)
    if scaling is None:
        return None
    if isinstance(variant, _KASA):
        b = b * layer.lora_diag[name]
    return a, b, scaling, p


def _factor(module):
    """The matrix A or B of a module, one of blocks on a diagonal in full; None: not ours to know."""
    weight = module._parameters.get("weight")
    if weight.__class__ not in PLAIN_TENSORS or module.__class__ not in FACTORS:
        return None
    return weight if module.__class__ is _Linear else module.weight_as_blockdiagonal_matrix()


def with_biases(layer, names, bias, dtype):
    """``bias`` (None: zero) with ``scaling`` times those on the B of adapters, in ``dtype``; one rounding."""
    factors, total = layer._modules["lora_B"]._modules, None
    for name in names:
        own = factors[name]._parameters.get("bias")
        if own is not None:
            part = own * layer.scaling[name]
            total = part if total is None else total + part
    if total is None:
        return bias
    return (total if bias is None else total + bias).to(dtype)


def served_variant(layer, name, variant, training):
    """Whether an adapter of a variant computes what plain LoRA does, in training or not."""
    if isinstance(variant, _PLAIN_IN_EVAL):
        return not training
    if isinstance(variant, _KASA):  # B diag A; a truncation of the base may still be due
        return name not in layer._lora_kasa_truncation_deferred
    return isinstance(variant, _PLAIN_VARIANTS)


def dora_magnitude(layer, name):
    """The magnitude of a DoRA adapter; None where the adapter is another, or PEFT's cache of norms is in use."""
    if not isinstance(layer.lora_variant.get(name), _DORA) or peft_dora.ENABLE_DORA_CACHING or layer.fan_in_fan_out:
        return None
    module = layer.lora_magnitude_vector[name]
    if type(module) is not peft_dora.DoraLinearLayer or not _unhooked(module):
        return None
    if getattr(module, "_dora_cache", None):  # as PEFT: of a forward with the cache, no longer true
        module._cache_clear()
    return module.weight


def scale(value, device):
    """A scaling as ops take it: a 0-d tensor (a float while Dynamo traces); None where it trains, or is zero.

    Zero gives the base layer's own bits in PEFT, which our kernels need not give.
    """
    if isinstance(value, torch.Tensor):
        return None if value.dim() or value.requires_grad else value
    if not value:
        return None
    if torch.compiler.is_compiling():
        return value
    return _scales.get((value, device)) or _kept_scale(value, device)


def _kept_scale(value, device):
    """One tensor a value, never written: it can not go stale."""
    with torch.inference_mode(False):
        scaling = torch.full((), float(value), dtype=torch.float32, device=device)
    if len(_scales) >= 1024:
        _scales.clear()
    _scales[value, device] = scaling
    return scaling


@functools.lru_cache(maxsize=256)
def scales(values, device):
    """Scalings of several adapters as one float32 tensor."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=16)
def activated_plan(counts, rows_each, device):
    """The plan of a batch in which the last ``counts[i]`` of the ``rows_each`` rows of item ``i`` have the adapter."""
    with torch.inference_mode(False):
        rows = [row >= rows_each - count for count in counts for row in range(rows_each)]
        return ops.plan_batch((torch.tensor(rows, dtype=torch.int32) - 1).to(device), num_slots=1)


@functools.lru_cache(maxsize=16)
def plan(slots, rows_each, num_slots, device):
    """The plan of a batch whose item ``i``, of ``rows_each`` rows, has slot ``slots[i]``: one for all layers."""
    with torch.inference_mode(False):
        rows = torch.tensor(slots, dtype=torch.int32).repeat_interleave(rows_each).to(device)
        return ops.plan_batch(rows, num_slots=num_slots)
