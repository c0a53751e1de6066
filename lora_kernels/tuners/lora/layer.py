"""The layers under the names that they have in ``peft.tuners.lora.layer``: without the "Lora" before them."""

from ...layers import LoraConv, LoraEmbedding, LoraLayer, LoraLinear, LoraParameter

Linear, Embedding, ParamWrapper = LoraLinear, LoraEmbedding, LoraParameter
Conv1d = Conv2d = Conv3d = LoraConv

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer", "ParamWrapper"]
