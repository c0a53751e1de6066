"""Names that users of PEFT import from ``peft.tuners.lora.config``."""

from ...config import LoraConfig, LoraRuntimeConfig

__all__ = ["LoraConfig", "LoraRuntimeConfig"]
