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


def layer_class(module, custom=None):
    """The LoRA layer for ``module``, or None; ``custom``, class of module -> class of layer, comes first."""
    own = (layer for kind, layer in (custom or {}).items() if isinstance(module, kind))
    return next(own, None) or next((kind for kind in KINDS if kind.accepts(module)), None)


def custom_layer(kind, layer):
    """A user's class of layers, made to take modules of the class ``kind``. None: no subclass of a layer here."""
    if not isinstance(layer, type) or not issubclass(layer, KINDS):
        return None
    if layer in KINDS:
        layer = type(layer.__name__, (layer,), {})
    layer.takes = (*layer.takes, kind)
    return layer


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
