"""LoRA layers: one file a kind of base layer, all on ``LoraLayer``, which owns the state of the adapters."""

from .attention import LoraAttention
from .auxiliary import AuxiliaryTrainingWrapper
from .base import LoraLayer
from .conv import LoraConv
from .embedding import LoraEmbedding
from .linear import LoraLinear
from .parameter import LoraParameter
from .saved import ModulesToSaveWrapper
from .token_wrapper import TrainableTokensWrapper
from .tokens import TrainableTokensLayer
from .transposed import LoraTransposed

# A base layer gets the first of these that accepts it.
KINDS = (LoraEmbedding, LoraConv, LoraAttention, LoraLinear, LoraTransposed)


def layer_class(module):
    """The LoRA layer for ``module``, or None."""
    return next((kind for kind in KINDS if kind.accepts(module)), None)


__all__ = [
    "KINDS",
    "AuxiliaryTrainingWrapper",
    "LoraAttention",
    "LoraConv",
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "LoraParameter",
    "LoraTransposed",
    "ModulesToSaveWrapper",
    "TrainableTokensLayer",
    "TrainableTokensWrapper",
    "layer_class",
]
