"""Names that users of PEFT import from ``peft.utils.peft_types``."""

from ..config import PeftType, TaskType

__all__ = ["PeftType", "TaskType"]
