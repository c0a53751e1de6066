"""Names that users of PEFT import from ``peft.utils.error``."""

from ..errors import NoMatchingPeftModuleError, PeftError

__all__ = ["NoMatchingPeftModuleError", "PeftError"]
