"""DoRA (Liu et al. 2024, arXiv:2402.09353): each row of ``W + s · B A`` is rescaled to a trained length.

``y = c ⊙ (x Wᵀ + s · x Aᵀ Bᵀ) + bias`` with ``c = magnitude / ‖W + s · B A‖`` a row; the norm carries no gradient.
With several adapters each works on what the one before it gave, as in PEFT; every norm is that of the base weight
with nothing merged.
"""

import torch
from torch import nn

from ..ops.dora import api as ops
from ..ops.wide import wide, wide_dtype
from .scaling import scaling_buffer


class Magnitude(nn.Module):
    """The trained lengths of the rows: ``weight``, (out_features), or (1, out_channels, 1, …) for convolutions."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


def add(layer, name, device, dtype):
    """Gives an adapter its magnitudes: the lengths of the rows as they are, so that nothing changes at first."""
    if torch.device(device).type == "meta":
        norm = torch.empty(layer.magnitude_shape(), device=device, dtype=dtype)
    else:
        norm = _norm(layer, name).to(dtype).view(layer.magnitude_shape())
    layer.lora_magnitude_vector[name] = Magnitude(norm)


def restart(layer, name):
    """The magnitudes of an adapter without an update as they are at its start: without effect, too."""
    magnitude = layer.lora_magnitude_vector[name].weight
    magnitude.copy_(_norm(layer, name).view_as(magnitude))


def update_rows(layer, name, x, y):
    """``y`` with a DoRA adapter on top; its input is dropped out on both paths, as in PEFT."""
    bias = layer.base_layer.bias if layer.has_bias else None
    bias = None if bias is None else layer._column(bias, y)
    factors = row_factors(layer, name)
    scale = layer._buffers[scaling_buffer(name)]
    c = layer._column(factors, y)
    if layer.training and layer.has_dropout and not isinstance(layer.lora_dropout[name], nn.Identity):
        x = layer._dropped(name, x)
        return y + (c - 1) * layer._base_product(x) + c * (layer._update(name, x) * scale)
    z = wide(y)
    if bias is None:
        return layer._add(name, x, z, scale) * c
    plain = z - bias
    return z + (layer._add(name, x, plain.clone(), scale) * c - plain)  # where nothing is trained yet, z bit for bit


def without(layer, name, x, y):
    """``y`` without a DoRA adapter that is in the weight."""
    bias = layer.base_layer.bias if layer.has_bias else None
    bias = 0.0 if bias is None else layer._column(bias, y)
    z = (wide(y) - bias) / layer._column(layer._merged_factors[name], y)
    return layer._add(name, x, z, -layer._merged[name]) + bias


def merge(layer, scalings):
    """Rescales and updates the weight by one adapter after another, and notes the factors."""
    factors = _all_factors(layer, scalings)
    if any(bool((c == 0).any()) for c in factors.values()):
        raise ValueError(
            "lora_magnitude_vector: a magnitude of 0 can not be merged: it would erase a row of the weight"
        )
    _merge_into(layer, layer._norm_matrix(), scalings, factors)
    layer._merged_factors.update(factors)


def unmerge(layer, scalings):
    """Takes adapters out again, the last one first; they must be the ones that were merged last."""
    weight = layer._norm_matrix()
    for name, scale in reversed(scalings.items()):
        a, b = _matrix(layer, name)
        factors = layer._merged_factors.pop(name, None)
        ops.scale_unmerge_(weight, a, b, scale, _ones(b) if factors is None else factors)


def merge_is_finite(layer, scalings):
    """Whether the weight would be finite after merging; tried on a copy."""
    weight = layer._norm_matrix().clone()
    _merge_into(layer, weight, scalings, _all_factors(layer, scalings))
    return bool(weight.isfinite().all())


def _all_factors(layer, scalings):
    """Of DoRA adapters that are about to be merged."""
    return {name: row_factors(layer, name, scale).detach() for name, scale in scalings.items() if layer.use_dora[name]}


def _merge_into(layer, weight, scalings, factors):
    for name, scale in scalings.items():
        a, b = _matrix(layer, name)
        ops.scale_merge_(weight, a, b, scale, factors[name] if name in factors else _ones(b))


def _ones(b):
    return torch.ones(len(b), dtype=wide_dtype(b), device=b.device)


def row_factors(layer, name, scale=None):
    """``c`` (out_features); 1 for a row of length 0, which has no direction: PEFT divides by 0 there."""
    norm = _norm(layer, name, scale)
    none = norm == 0
    magnitude = layer.lora_magnitude_vector[name].weight.reshape(-1)
    return (magnitude / norm.masked_fill(none, 1.0)).masked_fill(none, 1.0)


def _norm(layer, name, scale=None):
    """The length of the rows of the base weight, with nothing merged, plus the update of one adapter."""
    a, b = _matrix(layer, name)
    scale = layer._buffers[scaling_buffer(name)] if scale is None else scale
    if not layer._merged:
        return ops.row_norm(layer._norm_matrix(), a, b, scale)
    terms, total = _unmerged(layer)
    return _lengths(layer, [*terms, (a, wide(b) * scale * total[:, None])], total)


def _lengths(layer, terms, total):
    """The length of the rows of ``(W + Σ b a) / total``."""
    a, b = torch.cat([wide(a) for a, _ in terms]), torch.cat([b for _, b in terms], 1)
    return ops.row_norm(layer._norm_matrix(), a, b, 1.0) / total


def _unmerged(layer):
    """``terms, total``: the base weight with nothing merged is ``(W + Σ b a) / total``, W being what it holds now."""
    terms, total = [], torch.ones(layer.out_features, dtype=wide_dtype(layer.weight), device=layer.weight.device)
    for name in reversed(layer._merged):
        a, b = _matrix(layer, name)
        if name in layer._merged_factors:
            total = total * layer._merged_factors[name]
        terms.append((a, wide(b) * (-layer._merged[name] * total[:, None])))
    return terms, total


def _matrix(layer, name):
    return tuple(factor.detach() for factor in layer._norm_factors(name))
