"""The tensors of one adapter by their names in a checkpoint, out of a model and into it."""

import contextlib
import re
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from ..initial import rank_at_start
from ..layers import LoraLayer, ModulesToSaveWrapper, TrainableTokensLayer, TrainableTokensWrapper
from ..names import EMBEDDING_NAMES, below
from ..parameter_targets import Places
from ..walk import named_modules, submodule
from .checkpoint import CheckpointError, check_tensors, with_keys_of_now
from .layouts import for_adapter, is_foreign

PREFIX = "base_model.model."
_FSDP = "_fsdp_wrapped_module."  # in the paths of modules, and not in the keys of a state dict
DELTA = "token_adapter.trainable_tokens_delta"


class LoadResult(NamedTuple):
    """What loading found; it unpacks as the pair that torch's ``load_state_dict`` gives."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, torch.Tensor]:
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
    # FSDP gathers from all ranks, as the wrapper is told to; and scripts put a state_dict of their own on a model.
    if state_dict is None and ("state_dict" in model.__dict__ or any(_FSDP in n for n, _ in model.named_modules())):
        state_dict = model.state_dict()
    if state_dict is None:
        return {key: _tensor(model, source).detach() for key, source in keys.items()}
    # Ranks that gather nothing have nothing to save; a state dict may be what this function gave before.
    given = {key: source if source in state_dict else key for key, source in keys.items()}
    return {key: state_dict[source] for key, source in given.items() if source in state_dict}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool = False,
) -> LoadResult:
    """Copies the tensors of an adapter into the model, after all of them were checked.

    Those in the layouts of kohya's scripts and of diffusers too (see :mod:`.layouts`).

    Returns:
        ``(missing_keys, unexpected_keys)``; nothing is ever missing.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape or dtype, or not finite; with ``strict`` also
            when there are keys that the model does not know. The model is then unchanged.
    """
    peft_model_state_dict = with_keys_of_now(peft_model_state_dict)
    required, optional = adapter_keys(model, adapter_name)
    if is_foreign(peft_model_state_dict, has_config=not required.keys().isdisjoint(peft_model_state_dict)):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        peft_model_state_dict = for_adapter(base, peft_model_state_dict, adapter_name)
    optional = {**optional, **_embedding_keys(model, adapter_name, True, warn=False)}
    if not any(name.startswith(PREFIX) for name, _ in model.named_parameters()):
        peft_model_state_dict = {k.removeprefix(PREFIX): v for k, v in peft_model_state_dict.items()}
    own = {key: _base_key(model, key) for key in peft_model_state_dict if key not in required and key not in optional}
    taken = {
        key for key, target in own.items() if target != key and (target is None or target in peft_model_state_dict)
    }
    optional.update({key: target for key, target in own.items() if key not in taken})
    keys = {**optional, **required}
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
    ties = _ties(model, adapter_name, keys, tensors)
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key in keys:
                _assign(model, keys[key], tensor)
    for tie in ties:
        tie.renew()
    return LoadResult([], unexpected)


def adapter_keys(model, adapter_name):
    """Of an adapter: key in a checkpoint -> key in the model's state dict, required ones and others."""
    configs = model.peft_config
    if adapter_name not in configs:
        raise ValueError(f"adapter_name: no adapter '{adapter_name}'; adapters: {list(configs)}")
    required, optional = {}, {}
    bias = configs[adapter_name].bias
    copies = ()
    for path, module in named_modules(model):
        path = f"{path}.".replace(_FSDP, "")[:-1]
        if isinstance(module, LoraLayer) and adapter_name in module.r:
            keys = module.adapter_keys(adapter_name)
            required.update({f"{path}.{key}": f"{path}.{own}" for key, (own, _) in keys.items()})
        elif isinstance(module, ModulesToSaveWrapper):
            copies = (*copies, f"{path}.modules_to_save.")
            if adapter_name in module.modules_to_save:
                for key in module.modules_to_save[adapter_name].state_dict():
                    # Of a tied copy PEFT saves the weight alone.
                    kind = optional if adapter_name in module.tied and key != "weight" else required
                    kind[f"{path}.{key}"] = f"{path}.modules_to_save.{adapter_name}.{key}"
        elif isinstance(module, TrainableTokensWrapper) and adapter_name in module.saved_adapters():
            required[f"{path}.{DELTA}"] = f"{path}.{DELTA}.{adapter_name}"
        owner = bias == "all" or (bias == "lora_only" and path.endswith(".base_layer"))
        if owner and module._parameters.get("bias") is not None and not path.startswith(copies or "\0"):
            optional[f"{path}.bias"] = f"{path}.bias"
    return required, optional


def expected_shapes(targets):
    """Key -> shape of the tensors that a checkpoint for these targets must hold."""
    places, shapes, init = Places(targets.parameters), {}, targets.config.init_lora_weights
    for target in targets.lora:
        base = target.module.base_layer if isinstance(target.module, LoraLayer) else target.module
        options = {"use_dora": targets.config.use_dora, "lora_bias": targets.config.lora_bias}
        dense = "pissa" in target.layer_class.inits
        rank = rank_at_start(target.start(init), target.r, base.weight) if dense else target.r
        for key, (_, shape) in target.layer_class.checkpoint_keys(base, "", rank, **options).items():
            shapes[f"{PREFIX}{places.path(target.name)}.{key}"] = shape
    for name, module in targets.saved:
        module = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        saved = {k: v for k, v in module.state_dict().items() if name not in targets.saved_tied or k == "weight"}
        at = PREFIX + places.path(name)
        shapes.update({f"{at}.{key}": value.shape for key, value in saved.items()})
    for target in targets.tokens:
        if target.tied_to is None:
            size = len(target.indices), below(target.module).weight.shape[1]
            shapes[f"{PREFIX}{places.path(target.name)}.{DELTA}"] = size
    return shapes | {PREFIX + key: shape for key, shape in places.shapes(init).items()}


def _embedding_keys(model, adapter_name, wanted, warn=True):
    """The base weights of the input and output embeddings, where they are to be saved."""
    config = model.peft_config[adapter_name]
    targeted = _targets_embeddings(model, config)
    if wanted == "auto":
        wanted = targeted and config.trainable_token_indices is None
        if wanted and warn:
            warnings.warn(
                "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=3
            )
        elif not wanted and _vocabulary_changed(model, config):
            warnings.warn("the vocabulary was resized: the base weights of the embeddings are saved too", stacklevel=3)
            wanted = True
    layers = _embedding_layers(model) if wanted else None
    if wanted and warn and layers is None:
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.", stacklevel=3
        )
    if layers is None:
        return {}
    layers = [layer for layer in layers if layer is not None and (not targeted or isinstance(layer, LoraLayer))]
    bases = [layer if isinstance(layer, ModulesToSaveWrapper) else below(layer) for layer in layers]
    keys = {}
    for path, module in model.named_modules():
        if any(module is base for base in bases):
            keys.update({f"{path}.{name}": f"{path}.{name}" for name in module.state_dict()})
    return keys


def _embedding_layers(model):
    """The embeddings that a model names, input and output; None where it is not one of transformers."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    layers = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(NotImplementedError):  # vision models have none to name
            layers.append(getattr(model, name)())
    return layers


def _targets_embeddings(model, config):
    targets = config.target_modules
    if not isinstance(targets, str):
        return any(name in (targets or ()) for name in EMBEDDING_NAMES)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in EMBEDDING_NAMES]
    return any(re.fullmatch(targets, name) for name in names)


def _vocabulary_changed(model, config):
    """Whether the model has another ``vocab_size`` than what it was loaded from, a folder or in the Hub's cache."""
    now = getattr(model, "config", None)
    size, source = getattr(now, "vocab_size", None), config.base_model_name_or_path
    if not size or not source or not hasattr(type(now), "from_pretrained"):
        return False
    try:
        return type(now).from_pretrained(source, revision=config.revision, local_files_only=True).vocab_size != size
    except (OSError, ValueError):  # neither a folder with a config nor in the cache
        return False


def _ties(model, adapter_name, keys, tensors):
    """The ties of an adapter that the tensors agree with; the others are parted, with a warning.

    PEFT ties the factors of an output head alone, so that those of the embeddings of encoder and decoder may differ.
    """
    ties = {tie for m in model.modules() if isinstance(m, LoraLayer) for tie in m._ties}
    ties = [tie for tie in ties if tie.adapter_name == adapter_name]
    loaded = {id(_tensor(model, keys[key])): tensor for key, tensor in tensors.items() if key in keys} if ties else {}
    kept = []
    for tie in ties:
        values = [(loaded.get(id(own)), loaded.get(id(source))) for own, source in tie.pairs()]
        if all(v is not None and w is not None and torch.equal(tie.turned(w), v) for v, w in values):
            kept.append(tie)
        else:
            tie.cut()
            warnings.warn(
                "ensure_weight_tying: the adapters of tied layers differ in these tensors; they are loaded as they are",
                stacklevel=4,
            )
    return kept


def _base_key(model, key):
    """Where a tensor of the base model (a bias that another adapter trained, say) is in the model, or None.

    Up to PEFT 0.6 a layer with adapters had the tensors of its base layer itself.
    """
    path, _, name = key.rpartition(".")
    try:
        owner = submodule(model, path)
    except AttributeError:
        return None
    if re.search(r"\.(lora_\w+|modules_to_save|trainable_tokens_delta)\.", key):
        return None
    while isinstance(owner, LoraLayer):
        path, owner = f"{path}.base_layer", owner.base_layer
    found = owner._parameters.get(name) is not None or owner._buffers.get(name) is not None
    return f"{path}.{name}" if found else None


def _tensor(model, key):
    path, _, name = key.rpartition(".")
    owner = submodule(model, path)
    entry = owner._parameters.get(name)
    return owner._buffers[name] if entry is None else entry


def _assign(model, key, tensor):
    path, _, name = key.rpartition(".")
    present = _tensor(model, key)
    if present.is_meta:
        tensor = tensor.to(device=_device(model, path, tensor), dtype=present.dtype, copy=True)
        owner = submodule(model, path)
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=present.requires_grad)
    else:
        present.copy_(tensor)


def _device(model, path, tensor):
    """Where the layer with adapters that ``path`` is in has its base weight; in none, where the tensor is."""
    while path:
        if isinstance(module := submodule(model, path), (LoraLayer, TrainableTokensLayer)):
            return module.weight.device
        path = path.rpartition(".")[0]
    return tensor.device
