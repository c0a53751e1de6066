"""``convert_to_lora``, ``save_as_lora``: an adapter as one of another rank, with its scaling inside of B.

PEFT converts adapters of its other methods with these; here there are LoRA's, whose rank they change. The leading
singular triples of each update are kept (Eckart and Young 1936), found in the small core between the factors: the
(out, in) update is never built.
"""

import copy
import os
import warnings
from typing import Any

import torch
from torch import nn

from .combine import core
from .config import LoraConfig
from .io.checkpoint import save_adapter
from .io.state_dict import PREFIX, get_peft_model_state_dict
from .layers import LoraLayer, ModulesToSaveWrapper, TrainableTokensLayer
from .ops.wide import wide


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The adapter of ``model`` in another rank; the model is not changed.

    Args:
        model: a model with adapters on linear layers; a :class:`PeftModel`, or any module with such layers in it.
        rank: int: of every layer. float in (0, 1]: in each layer the least rank whose singular values have at least
            this part of the sum of squares of all.
        adapter_name: which adapter.
        progressbar: a ``tqdm`` bar over the layers.
        compile_kwargs: the computation of a layer goes through ``torch.compile`` with these.

    Returns:
        ``(config, tensors)``: a :class:`LoraConfig` of scaling 1, and the tensors under PEFT's keys in the dtype of the
        factors, with the modules that the adapter saves in full.

    Raises:
        TypeError: no layer has an adapter, or one has that is no plain update of a linear layer (DoRA, an embedding).
        ValueError: a rank out of range, an adapter with biases, or no such adapter.
    """
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        )
    if rank <= 0:
        raise ValueError(f"Passing a rank of {rank} doesn't make sense, please pass a valid value.")
    layers, given = _layers(model, adapter_name), _config_of(model, adapter_name)
    config = _config(given, rank)
    convert = _converted if compile_kwargs is None else torch.compile(_converted, **compile_kwargs)
    names = list(layers)
    if progressbar:
        from tqdm import tqdm

        names = tqdm(names, desc="Converting to LoRA")
    tensors = {}
    with torch.no_grad():
        for name in names:
            a, b = convert(layers[name], adapter_name, rank)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
            own = name.removeprefix(PREFIX)
            if len(a) != rank or isinstance(rank, float) or isinstance(config.target_modules, str):
                config.rank_pattern[own] = config.alpha_pattern[own] = len(a)
            if not isinstance(config.target_modules, str):
                config.target_modules.add(own)
    if given is not None and given.modules_to_save:
        config.modules_to_save = copy.copy(given.modules_to_save)
        tensors.update(_saved_in_full(model, adapter_name))
    return config, tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Writes what :func:`convert_to_lora` gives into the folder ``path``, as ``PeftModel.from_pretrained`` reads it."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    save_adapter(path, config, tensors, False, inference_mode=True)


def _layers(model, adapter_name):
    """Name -> layer that has the adapter. TypeError where none has any, or some can not be converted."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (LoraLayer, TrainableTokensLayer))}
    if not layers:
        raise TypeError(
            "Could not detect any layer that supports LoRA conversion. Adapters of other methods than LoRA are "
            "converted by `peft`, which makes them."
        )
    layers = {name: m for name, m in layers.items() if isinstance(m, TrainableTokensLayer) or adapter_name in m.r}
    if not layers:
        raise ValueError(f"adapter_name: no layer has an adapter '{adapter_name}'")
    tokens = (m for m in layers.values() if isinstance(m, TrainableTokensLayer))
    loras = (m for m in layers.values() if isinstance(m, LoraLayer))
    unsupported = {*map(type, tokens), *(type(m) for m in loras if not m.supports_lora_conversion(adapter_name))}
    if unsupported:
        kinds = ", ".join(sorted(map(repr, unsupported)))
        raise TypeError(f"Some module types on this model do not support LoRA conversion: {kinds}.")
    return layers


def _config_of(model, adapter_name):
    """The adapter's config, where the model has one. ValueError when it trains biases."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None:
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that.",
            stacklevel=3,
        )
        for name, none in (("bias", "none"), ("lora_bias", False)):
            if getattr(config, name) != none:
                value = getattr(config, name)
                raise ValueError(f"The adapter's config sets {name}={value}, this is not supported right now.")
    return config


def _config(given, rank):
    r = rank if isinstance(rank, int) else 1  # the ranks of a threshold are in the pattern
    config = LoraConfig(r=r, lora_alpha=r, target_modules=set())
    for name in ("target_modules", "base_model_name_or_path", "layers_pattern", "layers_to_transform"):
        if given is not None:
            setattr(config, name, copy.copy(getattr(given, name)))
    return config


def _converted(layer, adapter_name, rank):
    """``A (rank, in), B (out, rank)`` of one layer."""
    a, b = layer._factors(adapter_name)
    limit = min(len(b), a.shape[1])
    if isinstance(rank, int) and rank > limit:
        raise ValueError(
            f"The chosen rank {rank} is larger than the weight shape ({limit}), please choose a lower rank."
        )
    left, middle, right = core([(wide(a), wide(b))], [layer.scaling[adapter_name]])
    u, values, vh = torch.linalg.svd(middle, full_matrices=False)
    new_a, new_b = vh @ right, left @ (u * values)
    if isinstance(rank, float):
        energy = torch.cumsum(values**2, 0)
        rank = int(torch.searchsorted(energy, rank * energy[-1])) + 1
    missing = max(rank - len(values), 0)
    new_a = torch.cat([new_a[:rank], new_a.new_zeros(missing, new_a.shape[1])])
    new_b = torch.cat([new_b[:, :rank], new_b.new_zeros(len(new_b), missing)], 1)
    return new_a.to(a.dtype), new_b.to(b.dtype)


def _saved_in_full(model, adapter_name):
    paths = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper))
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {key: tensor for key, tensor in state.items() if key.startswith(paths)}
