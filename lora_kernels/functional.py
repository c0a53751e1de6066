"""What libraries call on a model that has adapters in it but no ``PeftModel`` around it."""

import copy
import warnings
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from .config import LoraConfig
from .io.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from .layers import AuxiliaryTrainingWrapper, LoraLayer, TrainableTokensWrapper
from .targeting import find_targets
from .tuner import LoraModel

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]

Model = TypeVar("Model", bound=nn.Module)


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: Model,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> Model:
    """Wraps layers of ``model``, in place, and returns ``model`` itself; the new adapter is active.

    Args:
        peft_config: a :class:`LoraConfig`.
        model: any module; it may have adapters already, from an earlier call.
        adapter_name: of the new adapter.
        low_cpu_mem_usage: its factors on the meta device.
        state_dict: the targets are those whose tensors are here, whatever the config says of modules and layers.

    Raises:
        ValueError, TypeError: a config that does not fit; the model is unchanged.
    """
    if state_dict is not None and peft_config.target_parameters:
        raise ValueError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`. This is "
            "not supported -- when using `target_parameters`, please inject the adapter without the state_dict."
        )
    if state_dict is not None:
        peft_config = copy.deepcopy(peft_config)
        keys = [key.removeprefix("base_model.model.") for key in state_dict if ".lora_" in key]
        named = {key.partition(".lora_")[0].removesuffix(".base_layer") for key in keys}
        _warn_of_inconsistency(model, peft_config, named)
        peft_config.target_modules = named
        peft_config.exclude_modules = peft_config.layers_to_transform = peft_config.layers_pattern = None
    before = model.__dict__.get("peft_config")
    if before is None:
        LoraModel(model, peft_config, adapter_name, autocast_adapter_dtype=False, meta=low_cpu_mem_usage)
        return model
    tuner = LoraModel.around(model, before)
    tuner.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=False, meta=low_cpu_mem_usage)
    tuner.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
    return model


def _warn_of_inconsistency(model, config, named):
    """Warns where ``config`` targets other modules than a state dict has tensors for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = {target.name for target in find_targets(model, config).lora}
    except ValueError:
        wanted = set()
    message = ""
    for source, names in (("PEFT config", wanted - named), ("state_dict", named - wanted)):
        if names:
            message += f"The {source} contained these additional target modules: {sorted(names)}. "
    if message:
        warnings.warn(
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
            f"provided state_dict. This is not necessarily an issue and can be ignored if this was the "
            f"intent. {message}",
            RuntimeWarning,
            stacklevel=3,
        )


def _parts(model):
    return [m for m in model.modules() if isinstance(m, (LoraLayer, AuxiliaryTrainingWrapper))]


def set_adapter(model, adapter_name, inference_mode=False, layer_cls=LoraLayer):
    """Makes an adapter (or a list of them) active in every layer of ``model``."""
    for part in _parts(model):
        part.set_adapter(adapter_name, inference_mode)


def delete_adapter(model, adapter_name, prefix="lora_", layer_cls=LoraLayer):
    """Removes an adapter from every layer that has it; returns the names that are still active, or None."""
    remaining = None
    for part in _parts(model):
        if isinstance(part, AuxiliaryTrainingWrapper) or adapter_name in part.r:
            part.delete_adapter(adapter_name)
        if not isinstance(part, TrainableTokensWrapper):  # which names only the adapters that have rows there
            remaining = remaining or part.active_adapters
    return remaining


def set_requires_grad(model, adapter_names, requires_grad=True):
    """Freezes or unfreezes adapters in every layer."""
    for part in _parts(model):
        part.set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype=True):
    """Turns half-precision factors of an adapter into float32 ones, in place; nothing when False is given."""
    if not autocast_adapter_dtype:
        return
    for part in _parts(model):
        part = part.token_adapter if isinstance(part, TrainableTokensWrapper) else part
        if not isinstance(part, AuxiliaryTrainingWrapper):
            for kind in part.adapter_layer_names:
                entry = getattr(part, kind)
                if adapter_name in entry:
                    owned = entry[adapter_name]
                    for parameter in owned.parameters() if isinstance(owned, nn.Module) else [owned]:
                        if parameter.dtype in (torch.float16, torch.bfloat16):
                            parameter.data = parameter.data.float()
