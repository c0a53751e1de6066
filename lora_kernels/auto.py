"""Names that users of PEFT import from ``peft.auto``."""

from .tasks import *  # noqa: F403
from .tasks import __all__ as _tasks

__all__ = [name for name in _tasks if not name.startswith("PeftModel")]
