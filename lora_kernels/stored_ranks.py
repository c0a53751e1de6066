"""Ranks and scalings of adapters whose weights were swapped or padded: the layers know them, and the config does not.

The config in memory stays as it was given, as in PEFT, whose next swap is compared with it; what is saved is put right.
"""

import collections
import copy
import re

from .layers import LoraAttention, LoraLayer, LoraParameter
from .walk import named_modules

_MARK = "_ranks_of_layers"


def base_model(model):
    """The model below the wrapper, where there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def names_in_config(model, adapter_name):
    """Of each layer with the adapter: the name that patterns are matched with, layer -> name."""
    names = {}
    for path, layer in named_modules(base_model(model)):
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.r:
            continue
        name = f"{path}.".replace(".base_layer.", ".")[:-1]
        names.setdefault(layer, f"{name}.{layer.weight_name}" if isinstance(layer, LoraParameter) else name)
        if isinstance(layer, LoraAttention):
            names[layer.base_layer.out_proj] = name
    return names


def note_swapped(model, adapter_name):
    """From now on the layers say what the ranks of this adapter are."""
    model.peft_config[adapter_name].__dict__[_MARK] = True


def config_of_layers(model, adapter_name):
    """The config of an adapter; where weights were swapped a copy that gives each layer the rank and alpha it has."""
    config = model.peft_config[adapter_name]
    if _MARK not in config.__dict__:
        return config
    config, names = copy.copy(config), names_in_config(model, adapter_name)
    for field, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        values = {layer: getattr(layer, field)[adapter_name] for layer in names}
        ((usual, _),) = collections.Counter(values.values()).most_common(1)
        # Of parameters always: what fused experts have by default is not what the config says.
        odd = [layer for layer in names if values[layer] != usual or isinstance(layer, LoraParameter)]
        setattr(config, field, usual)
        setattr(config, patterns, {f"^{re.escape(names[layer])}": values[layer] for layer in odd})
    return config
