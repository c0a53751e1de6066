"""The tensors of one adapter by their names in a checkpoint, out of a model and into it."""

import warnings
from collections import namedtuple

import torch
from torch import nn

from ..layers import LoraLayer, ModulesToSaveWrapper
from .checkpoint import CheckpointError, check_tensors

PREFIX = "base_model.model."
LoadResult = namedtuple("LoadResult", ["missing_keys", "unexpected_keys"])
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")


def get_peft_model_state_dict(
    model, state_dict=None, adapter_name="default", unwrap_compiled=False, save_embedding_layers="auto"
):
    """The tensors of an adapter as they are saved: the adapter name left out of the keys.

    Args:
        model: a model with adapters.
        state_dict: take the tensors from here (a gathered state dict) instead of from the model.
        adapter_name: which adapter.
        unwrap_compiled: take the module inside a ``torch.compile`` wrapper.
        save_embedding_layers: also the base weights of the embeddings; "auto": when they are targeted.

    Raises:
        ValueError: no such adapter.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    required, optional = adapter_keys(model, adapter_name)
    embeddings = _embedding_keys(model, adapter_name, save_embedding_layers)
    keys = {**required, **optional, **embeddings}
    if state_dict is None:
        return {key: _tensor(model, source).detach() for key, source in keys.items()}
    return {key: state_dict[source] for key, source in keys.items()}


def set_peft_model_state_dict(
    model,
    peft_model_state_dict,
    adapter_name="default",
    ignore_mismatched_sizes=False,
    low_cpu_mem_usage=False,
    strict=False,
):
    """Copies the tensors of an adapter into the model, after all of them were checked.

    Returns:
        ``(missing_keys, unexpected_keys)``; nothing is ever missing.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape or dtype, or not finite; with ``strict`` also
            when there are keys that the model does not know. The model is then unchanged.
    """
    required, optional = adapter_keys(model, adapter_name)
    optional = {**optional, **_embedding_keys(model, adapter_name, True, warn=False)}
    keys = {**optional, **required}
    if not any(name.startswith(PREFIX) for name, _ in model.named_parameters()):
        peft_model_state_dict = {k.removeprefix(PREFIX): v for k, v in peft_model_state_dict.items()}
    shapes = {key: _tensor(model, target).shape for key, target in keys.items()}
    tensors = dict(peft_model_state_dict)
    if ignore_mismatched_sizes:
        wrong = [k for k, t in tensors.items() if k in shapes and t.shape != shapes[k]]
        tensors = {k: t for k, t in tensors.items() if k not in wrong}
        required = {k: v for k, v in required.items() if k not in wrong}
        if wrong:
            warnings.warn(f"tensors of another size are left out: {wrong}", stacklevel=2)
    unexpected = check_tensors(tensors, {k: shapes[k] for k in required}, {k: shapes[k] for k in optional})
    if strict and unexpected:
        raise CheckpointError(f"the checkpoint holds keys that the model does not know: {unexpected[:8]}")
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key in keys:
                _assign(model, keys[key], tensor)
    return LoadResult([], unexpected)


def adapter_keys(model, adapter_name):
    """Of an adapter: key in a checkpoint -> key in the model's state dict, required ones and others."""
    configs = model.peft_config
    if adapter_name not in configs:
        raise ValueError(f"adapter_name: no adapter '{adapter_name}'; adapters: {list(configs)}")
    required, optional = {}, {}
    bias = configs[adapter_name].bias
    copies = ()
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.r:
            keys = module.adapter_keys(adapter_name)
            required.update({f"{path}.{key}": f"{path}.{own}" for key, (own, _) in keys.items()})
        elif isinstance(module, ModulesToSaveWrapper):
            copies = (*copies, f"{path}.modules_to_save.")
            if adapter_name in module.modules_to_save:
                for key in module.modules_to_save[adapter_name].state_dict():
                    required[f"{path}.{key}"] = f"{path}.modules_to_save.{adapter_name}.{key}"
        owner = bias == "all" or (bias == "lora_only" and path.endswith(".base_layer"))
        if owner and module._parameters.get("bias") is not None and not path.startswith(copies or "\0"):
            optional[f"{path}.bias"] = f"{path}.bias"
    return required, optional


def expected_shapes(targets):
    """Key -> shape of the tensors that a checkpoint for these targets must hold."""
    shapes = {}
    for target in targets.lora:
        base = target.module.base_layer if isinstance(target.module, LoraLayer) else target.module
        options = {"use_dora": targets.config.use_dora, "lora_bias": targets.config.lora_bias}
        for key, (_, shape) in target.layer_class.checkpoint_keys(base, "", target.r, **options).items():
            shapes[f"{PREFIX}{target.name}.{key}"] = shape
    for name, module in targets.saved:
        module = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        shapes.update({f"{PREFIX}{name}.{key}": value.shape for key, value in module.state_dict().items()})
    return shapes


def _embedding_keys(model, adapter_name, wanted, warn=True):
    """The base weights of the input and output embeddings, where they are to be saved."""
    targets = model.peft_config[adapter_name].target_modules
    targeted = not isinstance(targets, str) and any(name in targets for name in _EMBEDDING_NAMES)
    if wanted == "auto":
        wanted = targeted
        if wanted and warn:
            warnings.warn("embeddings are targeted: their base weights are saved too", stacklevel=3)
    if not wanted or not hasattr(model, "get_input_embeddings"):
        return {}
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    bases = [layer.base_layer if isinstance(layer, LoraLayer) else layer for layer in layers if layer is not None]
    keys = {}
    for path, module in model.named_modules():
        if any(module is base for base in bases) and (not targeted or path.endswith(".base_layer")):
            keys.update({f"{path}.{name}": f"{path}.{name}" for name in module.state_dict()})
    return keys


def _tensor(model, key):
    path, _, name = key.rpartition(".")
    owner = model.get_submodule(path)
    entry = owner._parameters.get(name)
    return owner._buffers[name] if entry is None else entry


def _assign(model, key, tensor):
    path, _, name = key.rpartition(".")
    present = _tensor(model, key)
    if present.is_meta:
        tensor = tensor.to(device=_device(model, path), dtype=present.dtype, copy=True)
        owner = model.get_submodule(path)
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=present.requires_grad)
    else:
        present.copy_(tensor)


def _device(model, path):
    """Where the LoRA layer that ``path`` is in has its base weight."""
    while not isinstance(model.get_submodule(path), LoraLayer):
        path = path.rpartition(".")[0]
    return model.get_submodule(path).weight.device
