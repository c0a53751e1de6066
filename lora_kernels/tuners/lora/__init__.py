"""Names that users of PEFT import from ``peft.tuners.lora``."""

from ...config import LoraConfig, LoraRuntimeConfig
from ...rerank import convert_to_lora, save_as_lora
from ...tuner import LoraModel
from .layer import *  # noqa: F403
from .layer import __all__ as _layers

__all__ = ["LoraConfig", "LoraModel", "LoraRuntimeConfig", "convert_to_lora", "save_as_lora", *_layers]
