"""Names that users of PEFT import from ``peft.tuners``."""

from .lora import LoraConfig, LoraModel, LoraRuntimeConfig

__all__ = ["LoraConfig", "LoraModel", "LoraRuntimeConfig"]
