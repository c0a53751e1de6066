"""Ways through a model that cost less than ``nn.Module``'s own, which recurse and ask every attribute by name."""

from torch import nn


def each_module(model, around=()):
    """What ``model.modules()`` gives, in its order; of layers of the class ``around`` only what they are around."""
    seen, stack = set(), [model]
    while stack:
        module = stack.pop()
        if module is not None and module not in seen:
            seen.add(module)
            yield module
            children = module._modules
            if children:
                stack.extend([children["base_layer"]] if isinstance(module, around) else reversed(children.values()))


def named_modules(model):
    """What ``model.named_modules()`` gives, in its order."""
    seen, stack = set(), [("", model)]
    while stack:
        path, module = stack.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        yield path, module
        before = path + "." if path else ""
        stack.extend([(before + name, child) for name, child in reversed(module._modules.items())])


def each_path(model):
    """``(parent, name in it, module)`` for every path but those to adapters: a module that is reached by several is
    there as often."""
    stack = [(None, "", model)]
    while stack:
        found = stack.pop()
        yield found
        children = found[2]._modules
        if "lora_A" in children:
            stack.append((found[2], "base_layer", children["base_layer"]))
        else:
            stack.extend([(found[2], name, child) for name, child in children.items() if child is not None])


def submodule(model, path):
    """``model.get_submodule(path)``: by the dicts, where they have all of the path."""
    module = model
    for name in path.split(".") if path else ():
        module = module._modules.get(name)
        if module is None:  # a path through what a module hands on (__getattr__)
            return model.get_submodule(path)
    return module


def into_eval(model):
    """``model.eval()``."""
    for module in each_module(model):
        kind = type(module)
        if kind.train is nn.Module.train and kind.__setattr__ is nn.Module.__setattr__:
            module.__dict__["training"] = False
        else:
            module.eval()
