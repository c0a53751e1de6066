"""The layers under the names that they have in ``peft.tuners.lora.layer``: without the "Lora" before them."""

from ... import layers
from ...layers import LoraLayer

_KINDS = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention")
globals().update({kind: getattr(layers, f"Lora{kind}") for kind in _KINDS if hasattr(layers, f"Lora{kind}")})

__all__ = ["LoraLayer", *(kind for kind in _KINDS if hasattr(layers, f"Lora{kind}"))]
