"""``get_layer_status`` and ``get_model_status``: what a model's adapters are doing, or "irregular"."""

import dataclasses
from typing import Literal

from torch import nn

from .layers import LoraLayer, ModulesToSaveWrapper, TrainableTokensLayer
from .tuner_facts import TunerFacts


@dataclasses.dataclass
class TunerLayerStatus:
    """Of one layer with adapters; dicts are by adapter name."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclasses.dataclass
class TunerModelStatus:
    """Of a whole model: a value that its layers share, or "irregular"."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Literal["irregular"] | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """A :class:`TunerLayerStatus` of each layer with adapters. ValueError when there is none."""
    inner = getattr(model, "base_model", None)  # a plain model of transformers has one, too: its backbone
    root = inner if isinstance(inner, TunerFacts) else model
    found = []
    for name, module in root.named_modules():
        if not isinstance(module, (LoraLayer, ModulesToSaveWrapper, TrainableTokensLayer)):
            continue
        tensors = {}
        for kind in module.adapter_layer_names:
            for adapter, entry in getattr(module, kind).items():
                owned = list(entry.parameters()) if isinstance(entry, nn.Module) else [entry]
                tensors.setdefault(adapter, []).extend(owned)
        found.append(
            TunerLayerStatus(
                name=name,
                module_type=repr(module).partition("(")[0],
                enabled=not module.disable_adapters,
                active_adapters=module.active_adapters,
                merged_adapters=list(module.merged_adapters),
                requires_grad={a: _one([t.requires_grad for t in owned]) for a, owned in tensors.items()},
                available_adapters=sorted(tensors),
                devices={a: sorted({t.device.type for t in owned}) for a, owned in tensors.items()},
                quantization_backend=getattr(getattr(module, "quantization_backend", None), "backend_name", None),
            )
        )
    if not found:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters "
            "injected in the model."
        )
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The :class:`TunerModelStatus` of a model with adapters. ValueError when it has none."""
    layers = get_layer_status(model)
    wrapped = hasattr(model, "get_base_model")
    tuner = model.base_model if wrapped else None
    configs = tuner.peft_config if wrapped else {}
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    left_out = any((set(layer.available_adapters) - set(layer.merged_adapters)) & set(merged) for layer in layers)
    return TunerModelStatus(
        base_model_type=type(model.get_base_model()).__name__ if wrapped else _plain_type(model),
        adapter_model_type=type(tuner).__name__ if wrapped else "None",
        peft_types={name: str(getattr(c.peft_type, "value", c.peft_type)) for name, c in configs.items()},
        trainable_params=sum(n for n, trained in sizes if trained),
        total_params=sum(n for n, _ in sizes),
        num_adapter_layers=len(layers),
        enabled=_one([layer.enabled for layer in layers]),
        active_adapters=_one([layer.active_adapters for layer in layers]),
        merged_adapters="irregular" if left_out else merged,
        requires_grad={name: _one(values) for name, values in _by_adapter(layers, "requires_grad").items()},
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={n: sorted({d for part in parts for d in part}) for n, parts in _by_adapter(layers, "devices").items()},
        quantization_backend=_one([layer.quantization_backend for layer in layers]),
    )


def _plain_type(model):
    """PEFT names the class of a transformers model, and calls any other "other"."""
    return type(model).__name__ if hasattr(model, "config") and hasattr(model, "dtype") else "other"


def _one(values):
    """The value that all share, or "irregular"."""
    return values[0] if all(value == values[0] for value in values) else "irregular"


def _by_adapter(layers, attribute):
    found = {}
    for layer in layers:
        for name, value in getattr(layer, attribute).items():
            found.setdefault(name, []).append(value)
    return found
