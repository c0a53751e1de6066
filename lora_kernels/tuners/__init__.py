"""Names that users of PEFT import from ``peft.tuners``."""

from . import trainable_tokens, tuners_utils
from .lora import LoraConfig, LoraModel, LoraRuntimeConfig

__all__ = ["LoraConfig", "LoraModel", "LoraRuntimeConfig", "trainable_tokens", "tuners_utils"]
