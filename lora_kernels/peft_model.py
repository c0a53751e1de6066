"""Names that users of PEFT import from ``peft.peft_model``."""

from .model import PeftModel, get_peft_model
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .tasks import *  # noqa: F403
from .tasks import __all__ as _tasks

__all__ = [
    "PeftModel",
    "TunerLayerStatus",
    "TunerModelStatus",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    *_tasks,
]
