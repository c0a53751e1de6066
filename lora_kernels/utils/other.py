"""Casts and base state dicts that users of ``peft.utils`` call."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from ..config import CONFIG_NAME
from ..io.checkpoint import PICKLE_NAME as WEIGHTS_NAME
from ..io.checkpoint import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from ..io.state_dict import LoadResult
from ..layers import (
    AuxiliaryTrainingWrapper,
    LoraLayer,
    ModulesToSaveWrapper,
    TrainableTokensLayer,
    TrainableTokensWrapper,
)
from ..tying import names_tied_to_embedding

__all__ = [
    "CONFIG_NAME",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "_get_submodules",
    "cast_mixed_precision_params",
    "get_base_model_state_dict",
    "infer_device",
    "prepare_model_for_kbit_training",
    "set_base_model_state_dict",
]


def _get_module_names_tied_with_embedding(model):
    """:func:`names_tied_to_embedding` of a model, or of the base model of one with adapters."""
    return names_tied_to_embedding(model.get_base_model() if hasattr(model, "get_base_model") else model)


def _get_submodules(model, key):
    """``parent, module, name``: of the module at the path ``key``."""
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), model.get_submodule(key), name


Model = TypeVar("Model", bound=torch.nn.Module)


def infer_device():
    """The kind of accelerator of this machine, or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def cast_mixed_precision_params(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters in ``dtype`` (float16 or bfloat16), trained ones in float32; in place."""
    for parameter in model.parameters():
        parameter.data = parameter.to(torch.float32 if parameter.requires_grad else dtype)


_PACKING = ("gptq", "aqlm", "eetq", "torchao", "hqq")


def prepare_model_for_kbit_training(
    model: Model,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Model:
    """Freezes a model; a quantised one trains with gradient checkpointing, and what it has in half precision is cast.

    Args:
        model: changed in place, and returned. Half-precision parameters become float32, but for bitsandbytes' 4-bit
            ones and where a method that packs the weights itself (GPTQ, AQLM, EETQ, HQQ, torchao) made the model.
        use_gradient_checkpointing: for a quantised model; any other is left as it is.
        gradient_checkpointing_kwargs: for ``gradient_checkpointing_enable``.
        auto_clear_cache: give back the accelerator memory that the casts left.
    """
    packed = getattr(model, "quantization_method", None) in _PACKING or getattr(model, "hqq_quantized", False)
    quantised = packed or getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        half = parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit"
        if half and not packed:
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    options = gradient_checkpointing_kwargs or {}
    if quantised and use_gradient_checkpointing and hasattr(model, "gradient_checkpointing_enable"):
        if options.get("use_reentrant", True) and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(**({"gradient_checkpointing_kwargs": options} if options else {}))
    return model


def _base_keys(model):
    """Key of the model before it had adapters -> key now."""
    keys = {}
    for path, module in model.named_modules():
        inside = path.split(".")
        if any(part.startswith(("lora_", "trainable_tokens_")) or part == "modules_to_save" for part in inside):
            continue
        owned = [n for n, p in module.named_parameters(recurse=False)]
        owned += [n for n in module._buffers if n not in module._non_persistent_buffers_set]
        plain = ".".join(part for part in inside if part not in ("base_layer", "original_module", "token_adapter"))
        if not isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper, TrainableTokensLayer)):
            keys.update({f"{plain}.{n}".lstrip("."): f"{path}.{n}".lstrip(".") for n in owned})
    return keys


def get_base_model_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the base model, with the keys it had before it was wrapped."""
    base = model.get_base_model()
    state = base.state_dict()
    return {plain: state[key] for plain, key in _base_keys(base).items() if key in state}


def set_base_model_state_dict(
    model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> LoadResult:
    """Loads what :func:`get_base_model_state_dict` gives.

    Returns:
        ``(missing_keys, unexpected_keys)``.

    Raises:
        RuntimeError: with ``strict``, keys that are missing or unknown.
    """
    base = model.get_base_model()
    keys = {plain: key for plain, key in _base_keys(base).items() if key in base.state_dict()}
    missing = [key for key in keys if key not in state_dict]
    unexpected = [key for key in state_dict if key not in keys]
    if strict and (missing or unexpected):
        parts = (("Missing", missing), ("Unexpected", unexpected))
        found = [f"{kind} key(s) in state_dict: {', '.join(map(repr, keys))}." for kind, keys in parts if keys]
        raise RuntimeError(f"Error(s) in loading state_dict for {type(base).__name__}: {' '.join(found)}")
    base.load_state_dict({keys[key]: value for key, value in state_dict.items() if key in keys}, strict=False)
    return LoadResult(missing, unexpected)
