"""New weights for an adapter that is there, under the same name: parameters stay, so compiled code stays valid."""

import math
import os
import warnings

import torch

from ..io.checkpoint import check_tensors
from ..io.source import read_adapter
from ..io.state_dict import adapter_keys
from ..layers import LoraLayer, dora
from ..stored_ranks import base_model, names_in_config, note_swapped
from ..targeting import pattern_value

__all__ = ["hotswap_adapter", "hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap"]
_SAME = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")


def hotswap_adapter(model, model_name_or_path, adapter_name, torch_device=None, **kwargs):
    """Puts the adapter saved in ``model_name_or_path`` in the place of ``adapter_name``.

    ``kwargs``: ``subfolder``, ``revision`` and what else ``PeftModel.load_adapter`` takes to find the files.

    Raises:
        ValueError: no such adapter, or a merged one; configs that differ in more than rank and alpha; damaged weights.
        RuntimeError: tensors for modules that the adapter in place does not have. The model is then unchanged.
    """
    inner = getattr(model, "_orig_mod", model)
    if adapter_name not in inner.peft_config:
        raise ValueError(f"adapter_name: no adapter '{adapter_name}'; adapters: {list(inner.peft_config)}")
    path, old = os.fspath(model_name_or_path), inner.peft_config[adapter_name]
    config, tensors = read_adapter(base_model(inner), path, device=torch_device, **kwargs)
    for name in _SAME:
        if getattr(old, name) != getattr(config, name):
            message = f"for {name}, {getattr(old, name)} != {getattr(config, name)}"
            raise ValueError(f"Configs are incompatible: {message}")
    required, _ = adapter_keys(inner, adapter_name)
    base = {key: tensor.detach() for key, tensor in inner.named_parameters(remove_duplicate=False) if key in tensors}
    same = [key for key, tensor in base.items() if torch.equal(tensor, tensors[key].to(tensor))]  # saved beside it
    tensors = {required.get(key, key): tensor for key, tensor in tensors.items() if key not in same}
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)


def hotswap_adapter_from_state_dict(model, state_dict, adapter_name, config, parameter_prefix="lora_"):
    """Puts tensors in the place of those of ``adapter_name``; a module that they are not all there for gets no update.

    A smaller rank fills the leading part of what is there. Keys are those of ``model.state_dict()``, whatever
    ``parameter_prefix`` is. Raises as :func:`hotswap_adapter`.
    """
    inner = getattr(model, "_orig_mod", model)
    names = names_in_config(inner, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in names):
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights. "
            "Please unmerge the adapter first by calling `peft_model.unmerge_adapter()`."
        )
    paths = {layer: path for path, layer in inner.named_modules() if layer in names}
    known = {f"{path}.{own}": (layer, own) for layer, path in paths.items() for own in _shapes(layer, adapter_name)}
    unexpected = [_with_name(key, adapter_name) for key in state_dict if key not in known]
    if unexpected:
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}.")
    given = {layer: {} for layer in paths}
    for key, tensor in state_dict.items():
        layer, own = known[key]
        given[layer][own] = tensor
    _check(paths, given, state_dict, adapter_name)
    ties = {tie for layer in paths for tie in layer._ties if tie.adapter_name == adapter_name}
    for own, _ in (pair for tie in ties for pair in tie.pairs()):
        own.data = own.data.clone()
    for layer in paths:
        with torch.no_grad():
            _swap(layer, adapter_name, given[layer])
        r = pattern_value(config.rank_pattern, names[layer], config.r)
        alpha = pattern_value(config.alpha_pattern, names[layer], config.lora_alpha)
        _rescale(layer, adapter_name, alpha, r, config.use_rslora)
        layer.scaling[adapter_name] = layer._own_scaling(adapter_name)
    for tie in ties:
        tie.renew()
    if hasattr(inner, "peft_config"):
        note_swapped(inner, adapter_name)


def prepare_model_for_compiled_hotswap(model, *, target_rank=None, config=None, check_compiled="error"):
    """Pads the adapters to ``target_rank`` with zeros, so that adapters of any smaller rank can be swapped in.

    Scalings are tensors here already, so that other values of alpha compile nothing anew.

    Raises:
        ValueError: a compiled model (unless ``check_compiled`` is "warn" or "ignore"), no adapter in it, or one of a
            larger rank. The model is then unchanged.
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
    inner = getattr(model, "_orig_mod", model)
    layers = [m for m in inner.modules() if isinstance(m, LoraLayer)]
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
            _pad(layer, name, target_rank)
    for tie in {tie for layer in layers for tie in layer._ties}:
        tie.renew()
    for name in getattr(inner, "peft_config", ()):
        note_swapped(inner, name)
    for one in (config.values() if isinstance(config, dict) else [config]) if config is not None else ():
        one.r = target_rank
        one.rank_pattern = dict.fromkeys(one.rank_pattern, target_rank)


def _with_name(key, adapter_name):
    """The key as it is in a model, where it came from a checkpoint."""
    module, _, ending = key.rpartition(".")
    known = module.endswith((".lora_A", ".lora_B", ".lora_magnitude_vector"))
    return f"{module}.{adapter_name}.{ending}" if known else key


def _shapes(layer, adapter_name, r=None):
    """Key in the layer -> shape, A's first, of an adapter of rank ``r``."""
    keys = layer.adapter_keys(adapter_name, r).values()
    return {own: shape for own, shape in keys if not own.startswith("base_layer.")}  # out_proj is a layer of its own


def _groups(layer):
    return getattr(layer.get_base_layer(), "groups", 1)


def _blocks(layer):
    """How many blocks of rows A has, each of which holds ranks of its own: of groups of channels, of experts."""
    return getattr(layer, "num_experts", _groups(layer))


def _check(paths, given, tensors, adapter_name):
    """CheckpointError where the tensors of a layer do not fit it, or each other."""
    required, optional = {}, {}
    for layer, path in paths.items():
        a = given[layer].get(next(iter(_shapes(layer, adapter_name))))
        whole = a is not None and a.dim() > 0
        rank = a.shape[0] // _blocks(layer) * _groups(layer) if whole else layer.r[adapter_name]
        for own, shape in _shapes(layer, adapter_name, max(rank, _groups(layer))).items() if given[layer] else ():
            (required if ".lora_magnitude_vector." in own else optional)[f"{path}.{own}"] = shape
    check_tensors(tensors, required, optional)


def _swap(layer, adapter_name, given):
    for own in _shapes(layer, adapter_name):
        place, tensor = layer.get_parameter(own), given.get(own)
        if tensor is None:
            place.zero_()
        elif any(new > old for new, old in zip(tensor.shape, place.shape, strict=True)):
            place.data = tensor.to(place)
        else:
            _fill(place, tensor.to(place), _blocks(layer))
    if not given and layer.use_dora[adapter_name]:
        dora.restart(layer, adapter_name)


def _pad(layer, adapter_name, target_rank):
    for own, shape in _shapes(layer, adapter_name, target_rank).items():
        place = layer.get_parameter(own)
        padded = torch.zeros(shape, dtype=place.dtype, device=place.device)
        _fill(padded, place.data, _blocks(layer))
        place.data = padded
    _rescale(layer, adapter_name, layer.lora_alpha[adapter_name], layer.r[adapter_name], layer.use_rslora[adapter_name])


def _fill(place, tensor, blocks):
    """A smaller rank fills the start of each block of rows, or, where the rows are the same, the first columns."""
    place.zero_()
    if tensor.shape[0] != place.shape[0]:
        place, tensor = place.unflatten(0, (blocks, -1)), tensor.unflatten(0, (blocks, -1))
    place[tuple(slice(size) for size in tensor.shape)] = tensor


def _rescale(layer, adapter_name, alpha, r, use_rslora):
    """Notes the rank that an adapter has in memory, and the alpha that scales it as ``alpha`` does at rank ``r``."""
    a = layer.get_parameter(next(iter(_shapes(layer, adapter_name))))
    stored, own = a.shape[0] // getattr(layer, "num_experts", 1), layer.use_rslora[adapter_name]
    alpha *= _divisor(stored, own) / _divisor(r, use_rslora)
    layer.r[adapter_name], layer.lora_alpha[adapter_name] = stored, int(alpha) if alpha == int(alpha) else alpha


def _divisor(r, use_rslora):
    return math.sqrt(r) if use_rslora else r
