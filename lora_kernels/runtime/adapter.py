"""``parse``: the factors of a checkpoint as a pool serves them, everything checked."""

import difflib
import math

import torch
from torch import nn

from ..initial import keeps_weights
from ..targeting import pattern_value
from .layer import WIDTHS, PooledLinear, bank_dtype

_PREFIX = "base_model.model."
_EXPERTS = "experts"  # what models call the layers of which a router gives each token some


def parse(pool, config, tensors, skip_modules_to_save):
    """``{path of a linear layer: (lora_a, lora_b, scaling)}`` of the model of ``pool``.

    Raises:
        ValueError: what a pool can not serve, or what does not fit the model; the message names it.
    """
    _check_config(config, skip_modules_to_save)
    saved, modules = tuple(config.modules_to_save or ()), dict(pool.model.named_modules())
    found, other = {}, []
    for key, tensor in tensors.items():
        path, factor = _place(key)
        if factor is not None:
            found.setdefault(path, {})[factor] = tensor
        elif not any(part in saved for part in key.split(".")) and not _is_the_models(modules, key, tensor):
            other.append(key)
    if other:
        raise ValueError(f"tensors: only LoRA on linear layers is served, got {other[:5]}")
    if not found:
        raise ValueError("tensors: no lora_A and lora_B found")
    linears = {
        name: module
        for name, module in modules.items()
        if name and isinstance(module, (nn.Linear, PooledLinear)) and not name.endswith(".base_layer")
    }
    return {
        path: _checked(pool, config, linears, path, factors)
        for path, factors in found.items()
        if not _takes_no_part(modules, path, factors)
    }


def closest(wanted, names):
    """ "; closest: a, b" of the names that are like ``wanted``; nothing where none is."""
    near = difflib.get_close_matches(wanted, list(names), n=3, cutoff=0.4)
    return f"; closest: {', '.join(near)}" if near else ""


def _check_config(config, skip_modules_to_save):
    if config.target_parameters:
        raise ValueError(f"config: target_parameters={config.target_parameters} is not served by the pool")
    if config.bias != "none":
        raise ValueError(f"config: bias={config.bias!r} trains base biases, which rows can not share")
    if not keeps_weights(config.init_lora_weights):
        raise ValueError(
            f"config: init_lora_weights={config.init_lora_weights!r} changes the base weights, which rows share; save "
            "the adapter with path_initial_model_for_weight_conversion first"
        )
    if config.modules_to_save and not skip_modules_to_save:
        raise ValueError(
            f"config: modules_to_save={list(config.modules_to_save)} is not served by the pool; pass "
            "skip_modules_to_save=True to load the adapter without them"
        )


def _place(key):
    for factor in ("lora_A", "lora_B"):
        ending = f".{factor}.weight"
        if key.endswith(ending):
            return key.removeprefix(_PREFIX).removesuffix(ending), factor
    return None, None


def _is_the_models(modules, key, tensor):
    """Whether the model has this very tensor: PEFT saves the weights of adapted embeddings and heads."""
    path, _, name = key.removeprefix(_PREFIX).rpartition(".")
    own = getattr(modules.get(path.removesuffix(".base_layer")), name, None)
    if not isinstance(own, torch.Tensor) or own.shape != tensor.shape:
        return False
    return torch.equal(own, tensor.to(own.device, own.dtype))


def _takes_no_part(modules, path, factors):
    """Whether no forward pass comes by the factors, which never trained: PEFT's "all-linear" makes such."""
    inside = isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)
    return inside and "lora_B" in factors and not factors["lora_B"].any()


def _checked(pool, config, linears, path, factors):
    if path not in linears:
        raise ValueError(f"tensors: the model has no linear layer '{path}'{closest(path, linears)}")
    layer = linears[path]
    if isinstance(layer, PooledLinear) and not pool.owns(path, layer):
        raise ValueError(f"model: another pool serves '{path}'; remove it first")
    if _EXPERTS in path.split(".")[:-1]:
        raise ValueError(f"tensors: '{path}' is an expert: which rows it is given, and in what order, a router decides")
    if isinstance(pool.model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention):
        raise ValueError(f"tensors: '{path}' is used by nn.MultiheadAttention without being called")
    if set(factors) != {"lora_A", "lora_B"}:
        raise ValueError(f"tensors: '{path}' has {sorted(factors)} only, expected lora_A and lora_B")
    lora_a, lora_b = factors["lora_A"], factors["lora_B"]
    in_features, out_features = layer.in_features, layer.out_features
    rank = lora_a.shape[0] if lora_a.dim() else 0
    if lora_a.dim() != 2 or lora_a.shape[1] != in_features or tuple(lora_b.shape) != (out_features, rank):
        raise ValueError(
            f"tensors: '{path}' expected lora_A (rank, {in_features}) and lora_B ({out_features}, rank), "
            f"got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
        )
    if not 1 <= rank <= pool.max_rank:
        raise ValueError(f"max_rank: '{path}' has rank {rank}, a slot holds 1 to {pool.max_rank}")
    expected = pattern_value(config.rank_pattern, path, config.r)
    if rank != expected:
        raise ValueError(f"config: '{path}' has rank {rank}, r and rank_pattern say {expected}")
    held, own = bank_dtype(layer, pool.dtype), layer.weight.dtype
    if own in WIDTHS and held not in (own, torch.float32):
        raise ValueError(f"dtype: '{path}' is {own}, its banks can be that or float32, not {held}")
    for factor, tensor in factors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.to(held)).all():
            raise ValueError(f"tensors: '{path}' {factor} must be finite floating numbers in {held}")
    alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
    return lora_a, lora_b, alpha / (math.sqrt(rank) if config.use_rslora else rank)
