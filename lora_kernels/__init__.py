"""LoRA for PyTorch with fused kernels: base product and low-rank update in one pass.

``get_peft_model`` and ``PeftModel`` for a model, ``LoraLinear`` for a layer, ``AdapterPool`` for a server,
``ops`` for a kernel engineer. Names, semantics and checkpoints are those of PEFT's LoRA.
"""

import pathlib

from . import ops
from .compat import peft_compat
from .config import LoraConfig, TaskType
from .integrations import accelerate, restore
from .io.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from .layers import LoraLinear
from .model import PeftModel, get_peft_model
from .ops.dispatch import use_backend
from .ops.explain import explain
from .runtime import AdapterPool
from .tuner import LoraModel

__version__ = (pathlib.Path(__file__).parent / "VERSION").read_text().strip()

__all__ = [
    "AdapterPool",
    "LoraConfig",
    "LoraLinear",
    "LoraModel",
    "PeftModel",
    "TaskType",
    "__version__",
    "accelerate",
    "explain",
    "get_peft_model",
    "get_peft_model_state_dict",
    "ops",
    "peft_compat",
    "restore",
    "set_peft_model_state_dict",
    "use_backend",
]
