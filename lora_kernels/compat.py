"""``peft_compat``: PEFT's results, for adapters that were trained with them and embody its defects."""

from torch import nn

from .layers import LoraAttention, LoraConv


def peft_compat(
    model: nn.Module, *, conv_zero_padding: bool | None = None, attention_out_twice: bool | None = None
) -> int:
    """Makes the layers of ``model`` compute what PEFT does where it is wrong; see DIFFERENCES.md.

    Args:
        model: any module with LoRA layers.
        conv_zero_padding: pad the adapters' input of convolutions with zeros, whatever the padding mode.
        attention_out_twice: count the update of ``out_proj`` of ``nn.MultiheadAttention`` twice: its scaling is
            doubled. Not while such a layer is merged.

    An argument that is None changes nothing.

    Returns:
        The number of layers that were set.

    Raises:
        ValueError: ``attention_out_twice`` while such a layer is merged.
    """
    convs, projections = (
        [m for m in model.modules() if isinstance(m, kind)] if flag is not None else []
        for kind, flag in ((LoraConv, conv_zero_padding), (LoraAttention, attention_out_twice))
    )
    projections = [attention.base_layer.out_proj for attention in projections]
    if any(layer.merged for layer in projections):
        raise ValueError("attention_out_twice: a layer is merged; unmerge first")
    for layer in convs:
        layer.zero_padding = bool(conv_zero_padding)
    for layer in projections:
        before, layer.scaling_factor = layer.scaling_factor, 2.0 if attention_out_twice else 1.0
        for name, scale in layer.scaling.items():
            layer.scaling[name] = scale * layer.scaling_factor / before
    return len(convs) + len(projections)
