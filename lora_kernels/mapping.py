"""Names that users of PEFT import from ``peft.mapping``: there is one type of adapter here."""

from typing import Any

from .config import LoraConfig, PeftType
from .functional import inject_adapter_in_model
from .model import get_peft_model
from .tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from .tuner import LoraModel

PEFT_TYPE_TO_CONFIG_MAPPING = {PeftType.LORA: LoraConfig}
PEFT_TYPE_TO_TUNER_MAPPING = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_PREFIX_MAPPING = {PeftType.LORA: LoraModel.prefix}

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "get_peft_model",
    "inject_adapter_in_model",
]


def get_peft_config(config_dict: dict[str, Any]) -> LoraConfig:
    """The :class:`LoraConfig` of a dict of fields. KeyError for a ``peft_type`` that is not LORA."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[config_dict["peft_type"]](**config_dict)
