"""Names that users of PEFT import from ``peft.tuners``."""

from . import tuners_utils
from .lora import LoraConfig, LoraModel, LoraRuntimeConfig

__all__ = ["LoraConfig", "LoraModel", "LoraRuntimeConfig", "tuners_utils"]
