"""The modules of a model by name, seen through the adapters that are there already."""

from .layers import AuxiliaryTrainingWrapper, LoraLayer, LoraParameter

EMBEDDING_NAMES = ("embed_tokens", "lm_head")  # those that PEFT knows as embeddings


def model_config(model):
    """The config of a transformers model, or what serves as one, as a dict."""
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return config if isinstance(config, dict) else {"model_type": getattr(config, "model_type", None)}


def module_names(model, every_path=False):
    """Name -> module of those an adapter may name: all but the inside of layers and wrappers that are there already.

    A layer around a parameter is around a whole module, whose own modules may be named.

    ``every_path``: a module that is reached by several paths is there under each, not under the first alone.
    """
    names, inside, parts = {}, None, parts_of_layers(model)
    for name, module in model.named_modules(remove_duplicate=not every_path):
        if name and not (inside and name.startswith(inside)) and id(module) not in parts:
            names[name] = module
            closed = isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)) and not isinstance(module, LoraParameter)
            inside = name + "." if closed else None
    return names


def parts_of_layers(model):
    """The ids of the modules that layers around parameters are made of, and of those that they are around."""
    layers = [module for module in model.modules() if isinstance(module, LoraParameter)]
    own = {id(part) for layer in layers for key, kind in layer._modules.items() if key != "base_layer"
           for part in kind.modules()}  # fmt: skip
    return own | {id(layer.base_layer) for layer in layers}


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
