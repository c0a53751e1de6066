"""The name that users of PEFT import from ``peft.mapping_func``."""

from .model import get_peft_model

__all__ = ["get_peft_model"]
