"""Where an adapter comes from: a folder, a file of another tool's layout, or a repository of the Hub.

``read_adapter`` gives its config and its tensors under PEFT's keys; no model is changed.
"""

import contextlib
import copy
import os
import re
import warnings

from ..config import CONFIG_NAME, LoraConfig
from ..fused_targets import stack_experts
from .checkpoint import PICKLE_NAME, WEIGHTS_NAME, CheckpointError, load_file_of_tensors, load_tensors
from .layouts import is_foreign, to_peft

PREFIX = "base_model.model."
# Arguments of PEFT that say where to look on the Hub, and how to place a model on several devices.
_HUB = ("revision", "token", "use_auth_token", "cache_dir", "force_download", "proxies", "local_files_only")
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
# What scripts pass along to it as to a model; of no effect in PEFT either.
_OF_MODELS = ("torch_dtype", "dtype", "trust_remote_code", "use_safetensors", "load_in_8bit", "load_in_4bit")
_PLACING = ("max_memory", "device_map", "offload_folder", "offload_dir", "offload_buffers", "offload_index")


def read_adapter(model, model_id, config=None, *, device="cpu", key_mapping=None, subfolder=None, **hub):
    """``(config, tensors)`` of an adapter.

    Args:
        model: the model it is for (names of another layout are mapped to its modules); not changed.
        model_id: a folder, a ``.safetensors`` or ``.bin`` file, or the name of a repository of the Hub.
        config: a :class:`LoraConfig` to use instead of the one in the folder.
        device: where the tensors go.
        key_mapping: regular expression -> replacement, the first that matches a key (without PEFT's prefix). None: what
            the model says its older checkpoints need (``_checkpoint_conversion_mapping`` in transformers).
        subfolder: of the folder or repository.
        hub: ``revision``, ``token``, ``cache_dir`` and the like; without effect on folders.

    Raises:
        CheckpointError, ValueError: nothing there, files that are damaged, or keys of no layout that is known.
        TypeError: an argument that loading does not have.
    """
    for name in _OF_MODELS:
        if hub.pop(name, None):
            warnings.warn(f"{name}: has no effect on adapters, only on the base model", stacklevel=3)
    unknown = [name for name in hub if name not in _HUB + _PLACING]
    if unknown:
        raise TypeError(f"{unknown[0]}: no such argument of loading; there are {', '.join(_HUB)}")
    device = "cpu" if device is None else device
    path = os.path.join(model_id, subfolder or "")
    if os.path.isfile(model_id):
        tensors, folder = load_file_of_tensors(model_id, device), None
    else:
        folder = path if os.path.isdir(model_id) else _hub_folder(model_id, subfolder, hub)
        tensors = None if _has_config(folder) or config is not None else _only_file(folder, device)
    if tensors is None:
        config = LoraConfig.from_pretrained(folder) if config is None else config
        tensors = load_tensors(folder, device)
    if is_foreign(tensors, config is not None):
        return to_peft(model, tensors, config)
    if config is None:
        raise ValueError(f"Can't find '{CONFIG_NAME}' at '{folder or os.path.dirname(model_id)}'")
    mapping = getattr(model, "_checkpoint_conversion_mapping", None) if key_mapping is None else key_mapping
    return copy.deepcopy(config), stack_experts(model, _renamed(tensors, mapping))


def _has_config(folder):
    return os.path.isfile(os.path.join(folder, CONFIG_NAME))


def _only_file(folder, device):
    """The tensors of a folder without a config: of its one file of weights, where that is in another layout."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    names = [name for name in names if name.endswith(".safetensors")] or [n for n in names if n.endswith(".bin")]
    if len(names) == 1:
        tensors = load_file_of_tensors(os.path.join(folder, names[0]), device)
        if is_foreign(tensors):
            return tensors
    raise ValueError(f"Can't find '{CONFIG_NAME}' at '{folder}'")


def _renamed(tensors, key_mapping):
    if not key_mapping:
        return tensors
    renamed = {}
    for key, tensor in tensors.items():
        prefix = PREFIX if key.startswith(PREFIX) else ""
        short = key.removeprefix(prefix)
        found = (re.subn(pattern, replacement, short) for pattern, replacement in key_mapping.items())
        renamed[prefix + next((new for new, count in found if count), short)] = tensor
    if len(renamed) != len(tensors):
        raise ValueError("key_mapping: two keys of the checkpoint are mapped to one")
    return renamed


def hub_file(name, file, subfolder=None, **hub):
    """A file of a repository on the Hub, or in its local cache (alone, where ``HF_HUB_OFFLINE`` says so): its path.

    Raises:
        ValueError: no such file, or nothing to look it up with.
    """
    wanted = f"'{file}' at '{name}'"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", os.fspath(name)):
        raise ValueError(f"Can't find {wanted}: no such folder")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ValueError(f"Can't find {wanted}: no such folder, and no huggingface_hub to look it up with") from error
    options = {key: value for key, value in hub.items() if key in DOWNLOAD_OPTIONS and value is not None}
    try:
        return hf_hub_download(name, file, subfolder=subfolder or None, **options)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"Can't find {wanted}: no such folder, and not on the Hub ({reason})") from error


def _hub_folder(name, subfolder, hub):
    """The folder of a repository of the Hub, once its files are in the local cache."""
    config = hub_file(name, CONFIG_NAME, subfolder, **hub)
    for weights in (WEIGHTS_NAME, PICKLE_NAME):
        with contextlib.suppress(ValueError):  # the other of the two may be there
            hub_file(name, weights, subfolder, **hub)
            return os.path.dirname(config)
    raise CheckpointError(f"'{name}': has a config, and neither '{WEIGHTS_NAME}' nor '{PICKLE_NAME}'")
