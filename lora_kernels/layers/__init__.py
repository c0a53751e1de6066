"""LoRA layers: one file a kind of base layer, all on ``LoraLayer``, which owns the state of the adapters."""

from .base import LoraLayer
from .embedding import LoraEmbedding
from .linear import LoraLinear
from .saved import ModulesToSaveWrapper

__all__ = ["LoraEmbedding", "LoraLayer", "LoraLinear", "ModulesToSaveWrapper"]
