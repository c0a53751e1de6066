"""LoRA for PyTorch with fused kernels: base product and low-rank update in one pass.

``get_peft_model`` and ``PeftModel`` for a model, ``LoraLinear`` for a layer, ``AdapterPool`` for a server,
``ops`` for a kernel engineer. Names, semantics and checkpoints are those of PEFT's LoRA.
"""

import pathlib

from . import helpers, ops, peft_model, tuners, utils
from .compat import peft_compat
from .config import LoraConfig, LoraRuntimeConfig, PeftType, TaskType
from .config import LoraConfig as PeftConfig
from .errors import NoMatchingPeftModuleError, PeftError, PeftWarning
from .functional import inject_adapter_in_model
from .integrations import accelerate, restore
from .io.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from .layers import LoraLinear
from .mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, get_peft_config
from .model import PeftModel, get_peft_model
from .ops.dispatch import use_backend
from .ops.explain import explain
from .rerank import convert_to_lora, save_as_lora
from .runtime import AdapterPool
from .status import get_layer_status, get_model_status
from .tasks import *  # noqa: F403
from .tasks import __all__ as _tasks
from .tuner import LoraModel
from .utils import (
    cast_mixed_precision_params,
    get_base_model_state_dict,
    load_peft_weights,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
)

__version__ = (pathlib.Path(__file__).parent / "VERSION").read_text().strip()

__all__ = [
    "AdapterPool",
    "LoraConfig",
    "LoraLinear",
    "LoraModel",
    "LoraRuntimeConfig",
    "NoMatchingPeftModuleError",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "PeftConfig",
    "PeftError",
    "PeftModel",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "__version__",
    "accelerate",
    "cast_mixed_precision_params",
    "convert_to_lora",
    "explain",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "ops",
    "peft_compat",
    "prepare_model_for_kbit_training",
    "restore",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "use_backend",
    "helpers",
    "peft_model",
    "tuners",
    "utils",
    *_tasks,
]
