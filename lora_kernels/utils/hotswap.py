"""New weights for an adapter that is there, under the same name: parameters stay, so compiled code stays valid."""

import math
import warnings

import torch

from ..config import LoraConfig
from ..io.checkpoint import CheckpointError, load_tensors
from ..io.state_dict import adapter_keys
from ..layers import LoraLayer
from ..targeting import pattern_value

__all__ = ["hotswap_adapter", "hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap"]
_SAME = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")


def hotswap_adapter(model, model_name_or_path, adapter_name, torch_device=None, subfolder=None, **kwargs):
    """Puts the adapter saved in ``model_name_or_path`` in the place of ``adapter_name``.

    Raises:
        ValueError: configs that differ in more than rank and alpha, a merged adapter, damaged weights.
        RuntimeError: tensors for modules that the adapter in place does not have. The model is then unchanged.
    """
    path = model_name_or_path if subfolder is None else f"{model_name_or_path}/{subfolder}"
    config = LoraConfig.from_pretrained(path)
    inner = getattr(model, "_orig_mod", model)
    old = inner.peft_config[adapter_name]
    for name in _SAME:
        if getattr(old, name) != getattr(config, name):
            message = f"for {name}, {getattr(old, name)} != {getattr(config, name)}"
            raise ValueError(f"Configs are incompatible: {message}")
    tensors = load_tensors(path, torch_device or "cpu")
    required, _ = adapter_keys(inner, adapter_name)
    tensors = {required.get(key, key): tensor for key, tensor in tensors.items()}
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)


def hotswap_adapter_from_state_dict(model, state_dict, adapter_name, config, parameter_prefix="lora_"):
    """Puts tensors in the place of those of ``adapter_name``; tensors that are missing become zeros.

    A smaller rank fills the leading part of what is there. Keys are those of ``model.state_dict()``.
    """
    inner = getattr(model, "_orig_mod", model)
    layers = {n: m for n, m in inner.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.r}
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights. "
            "Please unmerge the adapter first by calling `peft_model.unmerge_adapter()`."
        )
    mine = {f"{path}.": layer for path, layer in layers.items()}
    places = {
        key: tensor
        for key, tensor in inner.named_parameters()
        if parameter_prefix in key and f".{adapter_name}" in key and key.startswith(tuple(mine))
    }
    unexpected = [key for key in state_dict if key not in places]
    unexpected = [_with_name(key, adapter_name) for key in unexpected]
    if unexpected:
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}.")
    for key, tensor in state_dict.items():
        place = places[key]
        if tensor.dim() != place.dim() or not tensor.isfinite().all():
            raise CheckpointError(f"{key}: expected finite values of shape {tuple(place.shape)}")
    groups = {f"{path}.lora_A.{adapter_name}.weight": _groups(layer) for path, layer in layers.items()}
    with torch.no_grad():
        for key, place in places.items():
            _swap(place, state_dict.get(key), groups.get(key, 1))
    for path, layer in layers.items():
        r, alpha = (
            pattern_value(config.rank_pattern, path, config.r),
            pattern_value(config.alpha_pattern, path, config.lora_alpha),
        )
        layer.scaling[adapter_name] = alpha / (math.sqrt(r) if config.use_rslora else r)


def _with_name(key, adapter_name):
    """The key as it is in a model, where it came from a checkpoint."""
    module, _, ending = key.rpartition(".")
    known = module.endswith((".lora_A", ".lora_B", ".lora_magnitude_vector"))
    return f"{module}.{adapter_name}.{ending}" if known else key


def _groups(layer):
    return getattr(layer.get_base_layer(), "groups", 1)


def _swap(place, tensor, groups):
    """``groups``: blocks of rows, one of each group of a convolution; a smaller rank fills the start of each block."""
    if tensor is None:
        place.zero_()
    elif any(new > old for new, old in zip(tensor.shape, place.shape, strict=True)):
        place.data = tensor.to(device=place.device, dtype=place.dtype)
    else:
        place, tensor = place.unflatten(0, (groups, -1)), tensor.unflatten(0, (groups, -1))
        place.zero_()
        place[tuple(slice(size) for size in tensor.shape)] = tensor.to(place)


def _padded(tensor, size):
    """Zeros up to ``size`` in the second dimension."""
    missing = size - tensor.shape[1]
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], 1)


def prepare_model_for_compiled_hotswap(model, *, target_rank=None, config=None, check_compiled="error"):
    """Pads the adapters to ``target_rank`` with zeros, so that adapters of any smaller rank can be swapped in.

    Scalings are tensors here already, so that other values of alpha compile nothing anew.

    Raises:
        ValueError: a compiled model (unless ``check_compiled`` is "warn" or "ignore"), or no adapter in it.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        if check_compiled == "error":
            raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely "
                "result in re-compilation, hurting performance. Call the function before compiling the model.",
                stacklevel=2,
            )
    layers = [m for m in getattr(model, "_orig_mod", model).modules() if isinstance(m, LoraLayer)]
    if not layers:
        raise ValueError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    if target_rank is None:
        return
    wide = [r for layer in layers for r in layer.r.values() if r > target_rank]
    if wide:
        raise ValueError(
            f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger ({max(wide)})"
        )
    for layer in layers:
        if target_rank % _groups(layer):
            raise ValueError(
                f"Trying to pad a Conv2d LoRA adapter with groups={_groups(layer)} to target rank {target_rank}, but "
                f"the target rank is not divisible by {_groups(layer)}. Please choose a target rank that is divisible "
                f"by {_groups(layer)}."
            )
    for layer in layers:
        for name in layer.r:
            if name in layer.lora_A:
                a, b, groups = layer.lora_A[name].weight, layer.lora_B[name].weight, _groups(layer)
                blocks = a.data.unflatten(0, (groups, -1))
                a.data = _padded(blocks, target_rank // groups).flatten(0, 1)
                b.data = _padded(b.data, target_rank // groups)
    for one in (config.values() if isinstance(config, dict) else [config]) if config is not None else ():
        one.r = target_rank
        one.rank_pattern = dict.fromkeys(one.rank_pattern, target_rank)
