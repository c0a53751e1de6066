"""The modules of a model by name, seen through the adapters that are there already."""

from .layers import AuxiliaryTrainingWrapper, LoraLayer

EMBEDDING_NAMES = ("embed_tokens", "lm_head")  # those that PEFT knows as embeddings


def model_config(model):
    """The config of a transformers model, or what serves as one, as a dict."""
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return config if isinstance(config, dict) else {"model_type": getattr(config, "model_type", None)}


def module_names(model, every_path=False):
    """Name -> module of those an adapter may name: all but the inside of layers and wrappers that are there already.

    ``every_path``: a module that is reached by several paths is there under each, not under the first alone.
    """
    names, inside = {}, None
    for name, module in model.named_modules(remove_duplicate=not every_path):
        if name and not (inside and name.startswith(inside)):
            names[name] = module
            inside = name + "." if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)) else None
    return names


def below(module):
    """The module of the base model that a layer or wrapper stands around, or the module itself."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def name_of(model, module):
    """The first name under which ``module`` is in ``model``, or None."""
    return next((name for name, other in model.named_modules() if other is module), None)


def has_suffix(name, suffixes):
    """Whether ``name`` is one of ``suffixes``, or ends in one of them after a dot."""
    return name in suffixes or any(name.endswith("." + suffix) for suffix in suffixes)
