"""Names that users of PEFT import from ``peft.tuners.lora.model``."""

from ...targeting import DEFAULT_TARGETS as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from ...tuner import LoraModel

__all__ = ["TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "LoraModel"]
