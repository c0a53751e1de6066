"""``peft_compat``: PEFT's results, for adapters that were trained with them and embody its defects."""

from .layers import LoraConv


def peft_compat(model, *, conv_zero_padding=None):
    """Makes the layers of ``model`` compute what PEFT does where it is wrong; see DIFFERENCES.md.

    Args:
        model: any module with LoRA layers.
        conv_zero_padding: pad the adapters' input of convolutions with zeros, whatever the padding mode.

    An argument that is None changes nothing.

    Returns:
        The number of layers that were set.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraConv)] if conv_zero_padding is not None else []
    for layer in layers:
        layer.zero_padding = bool(conv_zero_padding)
    return len(layers)
