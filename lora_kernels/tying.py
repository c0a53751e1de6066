"""Weights that a model uses twice, mostly as embedding and as output head, and adapters of both: PEFT's rules.

``ensure_weight_tying`` gives the modules that are tied to the input embedding the adapter of the embedding: the same
low-rank factors, the same full copy, the same rows. Nothing here changes the model.
"""

import re
import warnings
from dataclasses import dataclass, field

from torch import nn

from .layers import LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper
from .names import EMBEDDING_NAMES, below, has_suffix, model_config, module_names, name_of


@dataclass
class Ties:
    """Names of modules that take over what the input embedding has: as targets, or saved in full."""

    embedding: str | None = None
    lora: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)


@dataclass
class TokenTarget:
    """A module some of whose rows an adapter trains; ``tied_to`` is the name of the one that has them."""

    name: str
    module: nn.Module
    indices: list[int]
    tied_to: str | None = None


def names_tied_to_embedding(model):
    """Sorted names of the modules whose weight is that of the input embedding, by ``_tied_weights_keys`` of the model.

    None are where the config says ``tie_word_embeddings=False``.

    Raises:
        ValueError: ``_tied_weights_keys`` is a dict, and there is no ``get_input_embeddings``.
    """
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", None) is False:
        return []
    keys = getattr(model, "_tied_weights_keys", None)
    if keys is None:
        return []
    if not isinstance(keys, dict):
        return sorted({key.rpartition(".")[0] for key in keys})
    if not hasattr(model, "get_input_embeddings"):
        raise ValueError(
            "The supplied model implements `_tied_weights_keys` as a dict but doesn't implement "
            "'get_input_embeddings' so we can't determine which weights are tied to embeddings."
        )
    weights = {id(p) for p in below(model.get_input_embeddings()).parameters()}
    names = module_names(model, every_path=True)
    tied = set()
    for path, module in [("", model), *names.items()]:
        inner = getattr(module, "_tied_weights_keys", None)
        prefix = f"{path}." if path else ""
        for key, source in inner.items() if isinstance(inner, dict) else ():
            owner, _, parameter = f"{prefix}{source}".rpartition(".")
            if owner in names and id(getattr(below(names[owner]), parameter, None)) in weights:
                tied.add(f"{prefix}{key}".rpartition(".")[0])
    return sorted(tied)


def input_embeddings_name(model, default=None):
    """The name of the module that ``get_input_embeddings`` returns, or ``default``."""
    if not hasattr(model, "get_input_embeddings"):
        return default
    return name_of(model, model.get_input_embeddings()) or default


def _paths_read(model):
    """The paths under which ``get_input_embeddings`` finds the input embedding; a model may have it under others."""
    if not hasattr(model, "get_input_embeddings"):
        return []
    embedding = model.get_input_embeddings()
    paths = [name for name, module in module_names(model, every_path=True).items() if module is embedding]
    return [path for path in paths if len(paths) == 1 or _is_read(model, path)]


def _is_read(model, path):
    parent, stand_in = model.get_submodule(path.rpartition(".")[0])._modules, nn.Identity()
    attribute = path.rpartition(".")[2]
    before, parent[attribute] = parent[attribute], stand_in
    try:
        return model.get_input_embeddings() is stand_in
    finally:
        parent[attribute] = before


def resolve_ties(model, config):
    """The :class:`Ties` of an adapter; ``config``, a copy, then names the embedding instead of what is tied to it."""
    ties, targets = Ties(), config.target_modules
    tied = names_tied_to_embedding(model)
    embeddings = EMBEDDING_NAMES
    if config.ensure_weight_tying and tied:  # which, in a saved config, stands for all that is tied to it
        embeddings = (*EMBEDDING_NAMES, input_embeddings_name(model, ""))
    if isinstance(targets, str):
        targeted = any(re.fullmatch(targets, name) for name in embeddings)
    else:
        targeted = any(_named(name, embeddings) for name in targets or ())
    saved = any(_named(name, embeddings) for name in config.modules_to_save or ())
    if not config.ensure_weight_tying:
        if (saved or targeted) and tied:
            _warn(
                "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
                "`ensure_weight_tying` is not set to True. This can lead to complications, for example when merging "
                "the adapter or converting your model to formats other than safetensors."
            )
        return ties
    if not tied:
        _warn("You have requested `ensure_weight_tying`, but no tied modules were found in the model")
    elif not (saved or targeted):
        _warn(
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or "
            "`target_modules`"
        )
    else:
        ties.embedding = input_embeddings_name(model, "")
        if saved:
            ties.saved = tied
            config.modules_to_save = _without_tied(config.modules_to_save, ties)
        else:
            ties.lora = tied
            if isinstance(targets, str):
                config.target_modules = rf"(?:{targets}|^{re.escape(ties.embedding)}$)"
            else:
                config.target_modules = set(_without_tied(targets, ties))
    return ties


_UNTIED = """
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(model_id, tie_word_embeddings=False)
# The head was initialised anew; it is to be what it was while it was tied
model.lm_head.weight.data = model.get_input_embeddings().weight.data.clone()
model.save_pretrained(untied_model_dir)

# Now use the original model but in untied format
model = AutoModelForCausalLM.from_pretrained(untied_model_dir)
```
"""


def warn_of_tied_targets(tuner):
    """As PEFT does before merging: what is merged into an embedding is no longer in the head that is tied to it."""
    named = any(name.rpartition(".")[2] in EMBEDDING_NAMES for name in tuner.targeted_module_names)
    if not named or not model_config(tuner.model).get("tie_word_embeddings"):
        return
    paths = [name for name, module in module_names(tuner.model).items() if isinstance(module, LoraLayer)]
    tied_target_modules = [name for name in paths if name.split(".")[-1] in EMBEDDING_NAMES]
    if tied_target_modules:
        warnings.warn(
            f"Model with `tie_word_embeddings=True` and the {tied_target_modules=} are part of the adapter. Merging "
            "gives each merged layer a weight of its own; modules that merge the same update share one again after "
            "merge_and_unload(). You can untie the embeddings by loading the model with `tie_word_embeddings=False`. "
            "For example:" + _UNTIED,
            stacklevel=4,
        )


def note_untied(model):
    """After merging: the config of ``model`` says so where input and output embeddings are one weight no longer."""
    if not model_config(model).get("tie_word_embeddings") or not hasattr(model, "get_output_embeddings"):
        return
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    inner, outer = (getattr(layer, "weight", None) for layer in layers)
    if inner is not None and outer is not None and inner.data_ptr() != outer.data_ptr():
        model.config.tie_word_embeddings = False
        warnings.warn(
            "Input and output embeddings are no longer tied after merging. Setting `tie_word_embeddings=False` in the "
            "model config.",
            stacklevel=4,
        )


def _named(name, embeddings):
    return name in embeddings or name.split(".")[-1] in EMBEDDING_NAMES


def _without_tied(names, ties):
    """``names`` with the embedding, and without the first that covers each of those that are tied to it."""
    names = list(dict.fromkeys([*names, ties.embedding]))
    if ties.embedding.split(".")[-1] not in EMBEDDING_NAMES:
        return names  # else PEFT, when it reads this config, would see no embedding in it
    for key in ties.saved or ties.lora:
        found = next((name for name in names if re.match(rf"(^|.*\.){name}($|\..*)", key)), None)
        names = [name for name in names if name != found]
    return names


def _warn(message):
    warnings.warn(message, stacklevel=7)


def token_targets(model, config, lora):
    """What ``trainable_token_indices`` means on this model; ``lora``: names of the modules that get low-rank updates.

    Raises:
        ValueError, TypeError: no such module, one that is trained otherwise too, or tied ones with different tokens.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return []
    embedding = input_embeddings_name(model)
    if not isinstance(wanted, dict):
        wanted = {embedding or "embed_tokens": wanted}
    names, tied = module_names(model, every_path=True), []
    weights_tied = model_config(model).get("tie_word_embeddings", False)
    if weights_tied:
        tied = names_tied_to_embedding(model)
    alike, following = _alike(wanted, embedding, tied, config.ensure_weight_tying)
    found = {}
    for key, indices in wanted.items():
        if key in following:
            continue
        places = [name for name in names if name.endswith(key)]
        if not places:
            raise ValueError(
                f"Target modules { {key} } not found in the base model. Please check the target modules and try again."
            )
        for name in places:
            found.setdefault(name, TokenTarget(name, names[name], indices))
    if config.ensure_weight_tying and not weights_tied:
        warnings.warn(
            "ensure_weight_tying=True but the model does not have tied weights (tie_word_embeddings=False). Weight "
            "tying will not be applied for trainable_token_indices.",
            stacklevel=6,
        )
    leader = next((found[path] for path in _paths_read(model) if path in found), None)
    if weights_tied and leader is not None and (alike or config.ensure_weight_tying):
        for name in [n for n in names if has_suffix(n, tied)]:
            found.setdefault(name, TokenTarget(name, names[name], leader.indices, leader.name))
    for target in found.values():
        _check_tokens(target, model, config, lora)
    return sorted(found.values(), key=lambda target: target.tied_to is not None)


def _alike(wanted, embedding, tied, ensure):
    """Whether the tied ones among ``wanted`` have the same tokens, and then those that follow the embedding.

    ValueError when they must have the same and have not.
    """
    leading = [k for k in wanted if embedding and embedding.endswith(k)]
    keys = leading + [k for k in wanted if k not in leading and any(t.endswith(k) or k in t.split(".") for t in tied)]
    if len(keys) < 2 or all(wanted[key] == wanted[keys[0]] for key in keys):
        return True, [key for key in keys if key in tied and leading and key not in leading]
    if ensure and tied:
        raise ValueError(
            "Cannot ensure weight tying when different token indices are specified for tied layers. Conflicting "
            f"layers: {', '.join(f'{key}: {wanted[key]}' for key in keys)}. Please use the same indices for all tied "
            "layers or set ensure_weight_tying=False."
        )
    return False, []


def _check_tokens(target, model, config, lora):
    name, module = target.name, target.module
    covered = any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save or ())
    if covered or isinstance(module, ModulesToSaveWrapper):
        raise ValueError(
            f"The embedding layer is already marked to be trained fully, either specify `modules_to_save=[..., "
            f"\"{name}\", ...]` or `trainable_tokens={{'{name}': x}}` but not both."
        )
    if name in lora or isinstance(module, LoraLayer) or not isinstance(below(module), (nn.Embedding, nn.Linear)):
        kind = "a LoRA layer" if name in lora or isinstance(module, LoraLayer) else str(type(module))
        raise TypeError(
            f"trainable_token_indices cannot be applied to modules of type {kind}: '{name}'; expected nn.Embedding or "
            "nn.Linear without LoRA"
        )
    rows = below(module).weight.shape[0]
    wrong = [i for i in target.indices if i >= rows]
    if wrong:
        raise ValueError(f"trainable_token_indices: '{name}' has {rows} rows, got the indices {wrong[:8]}")
    if isinstance(module, TrainableTokensWrapper):
        leader = module.token_adapter.tied_adapter
        if (leader is not None) != (target.tied_to is not None):
            raise ValueError(
                f"trainable_token_indices: '{name}' is {'' if leader is not None else 'not '}tied to the input "
                f"embedding by an earlier adapter, and the adapters of a module are all tied or all apart"
            )
