"""Modules made without their constructors, which are most of what wrapping a layer costs.

What a constructor leaves behind is read from one instance of the class, so it is that of the torch that is installed.
"""

import math

from torch import empty, nn

_CONTAINERS = frozenset({dict, set, type(nn.Module()._forward_hooks)})


def filler(like):
    """A function that gives a module the state that ``like()`` has."""
    state = like().__dict__
    fresh = [(key, value.__class__) for key, value in state.items() if value.__class__ in _CONTAINERS]
    shared = {key: value for key, value in state.items() if value.__class__ not in _CONTAINERS}

    def fill(module):
        own = module.__dict__
        own.update(shared)
        for key, container in fresh:
            own[key] = container()
        return module

    return fill


def maker(kind, like=None):
    """A function that makes what ``kind()`` does (or a ``kind`` with the state that ``like()`` has)."""
    fill, new = filler(like or kind), kind.__new__
    return lambda: fill(new(kind))


start = filler(nn.Module)  # what ``nn.Module.__init__`` does
module_dict, parameter_dict, identity = maker(nn.ModuleDict), maker(nn.ParameterDict), maker(nn.Identity)
_register = nn.Module.register_parameter
_linear = maker(nn.Linear, nn.Module)


def linear(in_features, out_features, bias, device, dtype):
    """``nn.Linear``, which draws the same numbers from torch's generator."""
    module = _linear()
    module.__dict__.update(in_features=in_features, out_features=out_features)
    own = module._parameters
    own["weight"] = nn.Parameter(empty((out_features, in_features), device=device, dtype=dtype))
    own["bias"] = nn.Parameter(empty(out_features, device=device, dtype=dtype)) if bias else None
    if nn.Module.register_parameter is not _register:  # accelerate's init_empty_weights, say
        for name in ("weight", "bias"):
            module.register_parameter(name, own.pop(name))
    like_linear(own["weight"], own["bias"])
    return module


def like_linear(weight, bias=None):
    """Fills a weight (out, in, …), and a bias, with what ``nn.Linear`` and convolutions start from: to the bit."""
    if weight.is_meta:
        return
    fan_in = math.prod(weight.shape[1:])
    std = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(fan_in)
    bound = math.sqrt(3.0) * std
    weight.detach().uniform_(-bound, bound)
    if bias is not None:
        edge = 1 / math.sqrt(fan_in)
        bias.detach().uniform_(-edge, edge)
