"""torch's fused encoder path reads the weights of linear layers without calling them; adapters need it off."""

from torch import nn

_SWITCHES = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


def fused_paths(modules, kind):
    """``[(module, attribute, value)]`` of the encoders whose fused path is on though they hold a ``kind`` of layer."""
    found = []
    for module in modules:
        attribute = _SWITCHES.get(type(module))
        value = getattr(module, attribute, 0) if attribute else 0
        if value and any(isinstance(m, kind) for m in module.modules()):
            found.append((module, attribute, value))
    return found


def turn_off(path):
    module, attribute, value = path
    setattr(module, attribute, type(value)(0))
