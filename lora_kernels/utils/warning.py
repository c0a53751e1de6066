"""The name that users of PEFT import from ``peft.utils.warning``."""

from ..errors import PeftWarning

__all__ = ["PeftWarning"]
