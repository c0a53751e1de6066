"""An adapter on disk: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them.

What is read is not trusted: no pickle is executed, and tensors are checked before a model sees them.
"""

import contextlib
import math
import os

import torch
from safetensors.torch import load_file, save_file

from ..config import CONFIG_NAME
from .files import replace_files

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that can not be read, or does not fit the model; nothing was changed.

    A RuntimeError too: what PEFT's users catch is that of ``load_state_dict``.
    """


def save_adapter(directory, config, tensors, pickled=False, **config_overrides):
    """Writes both files, or, after any error, neither. ``tensors``: key -> tensor.

    ``pickled``: into ``adapter_model.bin``, as old tools read it. Safetensors there would be read first: they go.
    """
    seen, whole = set(), {}
    for key, tensor in tensors.items():
        tensor = tensor.detach()
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        whole[key] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    weights = {WEIGHTS_NAME: lambda path: save_file(whole, path, metadata={"format": "pt"})}
    if pickled:
        weights = {PICKLE_NAME: lambda path: torch.save(whole, path)}
    replace_files(directory, {**weights, CONFIG_NAME: config.to_json(**config_overrides).encode()})
    if pickled:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, WEIGHTS_NAME))


def load_tensors(directory, device="cpu"):
    """The tensors of the adapter in ``directory``: key -> tensor.

    Raises:
        CheckpointError: no such file, or one that is truncated, foreign or holds more than tensors.
    """
    for name in (WEIGHTS_NAME, PICKLE_NAME):
        path = os.path.join(directory, name)
        if os.path.isfile(path):
            return load_file_of_tensors(path, device)
    raise CheckpointError(f"Can't find '{WEIGHTS_NAME}' (or '{PICKLE_NAME}') at '{directory}'")


def load_file_of_tensors(path, device="cpu"):
    """The tensors in a file: safetensors, or a pickle (``.bin``, ``.pt``) read without running it. Raises as above."""
    try:
        if os.fspath(path).endswith(".safetensors"):
            return with_keys_of_now(load_file(path, device=str(device)))
        tensors = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable file of tensors ({str(error).splitlines()[0]})") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path}: expected a dict of tensors, got {type(tensors).__name__}")
    return with_keys_of_now(tensors)


def with_keys_of_now(tensors):
    """The magnitudes of DoRA are a parameter ``weight`` of a module in a model, and in files that some tools wrote."""
    ending = ".lora_magnitude_vector.weight"
    return {k.removesuffix(".weight") if k.endswith(ending) else k: tensor for k, tensor in tensors.items()}


def check_tensors(tensors, required, optional=()):
    """Checks tensors against what the model expects; returns the keys that it does not know.

    Args:
        tensors: key -> tensor.
        required, optional: key -> shape.

    Raises:
        CheckpointError: keys missing, or tensors of another shape, of a dtype that is not floating, or with
            Inf or NaN; the message lists them.
    """
    shapes = {**dict(optional), **required}
    problems = [f"missing {key}" for key in required if key not in tensors]
    for key, tensor in tensors.items():
        if key not in shapes:
            continue
        whole = not tensor.is_floating_point() and ".lora_" not in key  # a counter of a module saved in full
        if tuple(tensor.shape) != tuple(shapes[key]):
            problems.append(f"size mismatch for {key}: expected shape {tuple(shapes[key])}, got {tuple(tensor.shape)}")
        elif tensor.dtype not in _DTYPES and not whole:
            problems.append(f"{key}: expected float32, float16, bfloat16 or float64, got {tensor.dtype}")
        elif not whole and not _is_finite(tensor):
            problems.append(f"{key}: holds Inf or NaN")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"the checkpoint does not fit the model: {'; '.join(problems[:8])}{more}")
    return [key for key in tensors if key not in shapes]


def _is_finite(tensor):
    """One read and no temporary: a finite sum has finite terms; one that is not may only be too large."""
    return math.isfinite(tensor.detach().sum().item()) or bool(tensor.isfinite().all())
