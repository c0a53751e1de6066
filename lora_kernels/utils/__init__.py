"""Names that users of PEFT import from ``peft.utils``."""

from ..config import CONFIG_NAME, PeftType, TaskType
from ..errors import NoMatchingPeftModuleError, PeftError, PeftWarning
from ..io.checkpoint import PICKLE_NAME as WEIGHTS_NAME
from ..io.checkpoint import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from ..layers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from ..targeting import DEFAULT_TARGETS as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from . import constants, hotswap
from .constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from .other import _get_submodules, cast_mixed_precision_params, infer_device, prepare_model_for_kbit_training
from .save_and_load import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

__all__ = [
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "TrainableTokensWrapper",
    "_get_submodules",
    "cast_mixed_precision_params",
    "constants",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "hotswap",
    "infer_device",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
