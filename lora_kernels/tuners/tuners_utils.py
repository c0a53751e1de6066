"""Names that users of PEFT import from ``peft.tuners.tuners_utils``."""

from ..functional import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from ..layers import LoraLayer as BaseTunerLayer
from ..tuner import LoraModel as BaseTuner

__all__ = ["BaseTuner", "BaseTunerLayer", "cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad"]
