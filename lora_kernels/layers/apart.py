"""Merging adapters whose updates are more than one sum into one matrix.

That is: DoRA rescales the rows after the sum, ``lora_bias`` also adds to the bias, and a stack of experts takes one
update a matrix. Adapters go in one after another, and out in the opposite order.
"""

from .. import ops
from ..ops import dispatch
from ..ops.scalars import scaling_tensor
from . import dora


def applies(layer, names):
    """Whether these adapters, or those that are merged, need this file."""
    return layer.several or any(layer.use_dora[n] or layer.lora_bias[n] for n in (*names, *layer._merged))


def check(layer, names):
    """RuntimeError, before anything is changed, for a bias that has nowhere to go."""
    if any(layer.lora_bias[name] for name in names) and layer.get_base_layer().bias is None:
        raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")


def is_finite(layer, names):
    """Whether weight and bias would be finite after merging."""
    scalings = {name: layer.scaling[name] for name in names}
    if any(not bool(layer.lora_B[n].bias.isfinite().all()) for n in names if layer.lora_bias[n]):
        return False
    if any(layer.use_dora[name] for name in names) or layer._merged_factors:
        return dora.merge_is_finite(layer, scalings)
    for weight, terms in updates(layer, scalings):
        check = dispatch.select("merge_is_finite", weight)
        if not bool(check(weight, *terms[:2], scaling_tensor(terms[2], weight), 1.0)):
            return False
    return True


def add(layer, scalings):
    """Merges ``scalings``, adapter -> scaling, on top of what is merged."""
    if layer._merged_factors or any(layer.use_dora[name] for name in scalings):
        dora.merge(layer, scalings)
    else:
        for weight, terms in updates(layer, scalings):
            ops.merge_(weight, *terms)
    layer._merged = {**layer._merged, **scalings}
    _shift_bias(layer, scalings, 1.0)
    layer._reroute()


def take_out(layer, names):
    """Unmerges adapters. With DoRA, what was merged after the first of them leaves with it, and comes back."""
    merged = layer._merged
    out = {name: scale for name, scale in merged.items() if name in names}
    if not layer._merged_factors:
        for weight, terms in updates(layer, out):
            ops.unmerge_(weight, *terms)
        layer._merged = {name: scale for name, scale in merged.items() if name not in names}
        _shift_bias(layer, out, -1.0)
        layer._reroute()
        return
    first = min(list(merged).index(name) for name in out)
    above = dict(list(merged.items())[first:])
    dora.unmerge(layer, above)
    layer._merged = dict(list(merged.items())[:first])
    _shift_bias(layer, above, -1.0)
    layer._reroute()
    back = {name: scale for name, scale in above.items() if name not in names}
    if back:
        add(layer, back)


def become(layer, merged):
    """Merges and unmerges until ``merged``, adapter -> scaling, is what the layer holds."""
    extra = [n for n, scale in layer._merged.items() if merged.get(n) != scale]
    if extra:
        take_out(layer, extra)
    missing = {name: scale for name, scale in merged.items() if name not in layer._merged}
    if missing:
        add(layer, missing)


def updates(layer, scalings):
    """``weight, (lora_a, lora_b, scaling)`` for each matrix of the weight, several adapters as one."""
    pairs = [layer._matrix_factors(name) for name in scalings]
    for index, weight in enumerate(layer._matrices()):
        yield weight, layer._as_one([each[index] for each in pairs], list(scalings.values()))


def _shift_bias(layer, scalings, sign):
    for name, scale in scalings.items():
        if layer.lora_bias[name]:
            bias = layer.get_base_layer().bias.detach()
            bias.add_(layer.lora_B[name].bias.detach().to(bias.dtype), alpha=sign * scale)
