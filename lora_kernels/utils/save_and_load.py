"""Names of ``peft.utils.save_and_load``."""

import os

import torch

from ..io.checkpoint import load_tensors
from ..io.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from .other import get_base_model_state_dict, infer_device, set_base_model_state_dict

__all__ = [
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]


def load_peft_weights(
    model_id: str | os.PathLike[str], device: torch.device | str | None = None, subfolder: str | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of the adapter saved in the directory ``model_id``. CheckpointError when there is none."""
    return load_tensors(os.path.join(model_id, subfolder or ""), device or infer_device())
