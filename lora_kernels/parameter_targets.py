"""Which bare parameters of a model an adapter touches (``target_parameters``), and where their layers come to lie."""

import collections
import difflib
import re
from dataclasses import dataclass

from torch import nn

from .initial import rank_at_start
from .layers import AuxiliaryTrainingWrapper, LoraLayer, LoraParameter
from .layers.parameter import chain, parameter_keys
from .names import parts_of_layers

_BELOW = ".base_layer"


@dataclass
class ParameterTarget:
    """A parameter to be given an adapter.

    ``name``: of the module that has it, or of the outermost of the layers ``around`` its parameters; ``layer``: that of
    this parameter, where there is one.
    """

    name: str
    parameter: str
    module: nn.Module
    around: list[LoraParameter]
    r: int
    lora_alpha: float

    @property
    def full_name(self):
        """As in the model before any adapter."""
        return full_name(self.name, self.parameter)

    @property
    def layer(self):
        return next((layer for layer in self.around if layer.parameter_name == self.parameter), None)


def full_name(module_name, parameter_name):
    """Of a parameter as in the model before any adapter."""
    return f"{module_name.replace(_BELOW, '')}.{parameter_name}"


def find_parameters(model, config, targeted, pattern_value):
    """The targets that ``config.target_parameters`` names: in full, or by the end of the name.

    Args:
        targeted: names of the modules that get an adapter themselves.
        pattern_value: how ``rank_pattern`` and ``alpha_pattern`` are read.

    Raises:
        ValueError: a parameter of the model itself, which has no parent to hold a layer, of a module that has or gets
            an adapter itself.
        TypeError: a parameter of a module that is saved in full.
    """
    found = []
    for name, module, layers in _owners(model) if config.target_parameters else ():
        plain = name.replace(_BELOW, "")
        for parameter in _parameters(module):
            full = f"{plain}.{parameter}"
            if not any(full == wanted or full.endswith("." + wanted) for wanted in config.target_parameters):
                continue
            _check(config, plain, parameter, module, name in targeted or layers is None)
            r = pattern_value(config.rank_pattern, full, config.r)
            alpha = pattern_value(config.alpha_pattern, full, config.lora_alpha)
            found.append(ParameterTarget(name, parameter, module, layers, r, alpha))
    return found


def _owners(model):
    """``name, module, layers``: every module that is no part of an adapter, and the layers around its parameters.

    ``name`` is that of the outermost of them; ``layers`` is None where the module itself has an adapter.
    """
    inside, parts = None, parts_of_layers(model)
    for name, module in model.named_modules():
        if (inside and name.startswith(inside)) or id(module) in parts:
            continue
        inside = None
        if isinstance(module, AuxiliaryTrainingWrapper):
            inside = name + "."
        elif isinstance(module, LoraLayer) and not isinstance(module, LoraParameter):
            yield name, module.get_base_layer(), None
            inside = name + "."
        else:
            layers, owner = chain(module)
            yield name, owner, layers


def _parameters(module):
    """Names in the order of registration; of a parametrized module in that of the alphabet, as in PEFT."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return sorted([*names, *module.parametrizations]) if hasattr(module, "parametrizations") else names


def _check(config, plain, parameter, module, adapted):
    if not plain:
        raise ValueError(
            f"Targeting an nn.Parameter on the top-level module is not supported (parameter '{parameter}')."
        )
    if adapted:
        raise ValueError(
            f"Trying to wrap an `nn.Parameter` of layer '{plain}' of type {type(module).__name__}, which is not "
            "a valid target. Make sure that this layer is not also targeted with `target_modules`. For some models, "
            "this is done automatically, try setting `target_modules=[]` to prevent it."
        )
    saved = [m for m in config.modules_to_save or () if re.match(rf"(^|.*\.){m}($|\..*)", plain)]
    if saved:
        raise TypeError(f"modules_to_save: {saved} holds '{plain}.{parameter}'; name it in one of the two")


def check_same(configs, config):
    """ValueError when another adapter has other target parameters: layers around layers could not tell them apart."""
    wanted = set(config.target_parameters or ())
    for name, other in configs.items():
        if wanted and other.target_parameters and set(other.target_parameters) != wanted:
            raise ValueError(
                "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                f"parameters, but got {sorted(wanted)} for the new adapter and {sorted(other.target_parameters)} for "
                f"adapter '{name}'."
            )


def unused(config, targets):
    """The entries of ``target_parameters`` that matched nothing."""
    names = [target.full_name for target in targets]
    return [w for w in config.target_parameters or () if not any(n == w or n.endswith("." + w) for n in names)]


def closest(model, wanted):
    """Names of parameters that look most like ``wanted``."""
    names = {f"{n}.{p}".replace(_BELOW, "") for n, module, _ in _owners(model) for p in _parameters(module)}
    parts = wanted.count(".") + 1
    short = {".".join(name.split(".")[-parts:]) for name in names}
    return difflib.get_close_matches(wanted, sorted(short), n=3, cutoff=0.4)


class Places:
    """Where modules lie once the layers around parameters are there."""

    def __init__(self, parameters):
        self.new = collections.Counter(target.name for target in parameters if target.layer is None)
        self.parameters = parameters

    def path(self, name):
        """Of a module that is ``name`` now."""
        for outer in sorted(self.new, key=len, reverse=True):
            if name.startswith(outer + "."):
                name = outer + _BELOW * self.new[outer] + name.removeprefix(outer)
        return name

    def shapes(self, init_lora_weights):
        """Key -> shape of the tensors of the adapter of each parameter."""
        shapes, seen = {}, collections.Counter()
        for target in self.parameters:
            if target.layer is None:
                seen[target.name] += 1
                depth = self.new[target.name] - seen[target.name]
            else:
                depth = self.new[target.name] + target.around.index(target.layer)
            path = self.path(target.name) + _BELOW * depth
            weight = getattr(target.module, target.parameter)
            rank = rank_at_start(init_lora_weights, target.r, weight) if weight.dim() == 2 else target.r
            keys = parameter_keys(target.module, target.parameter, "", rank)
            shapes.update({f"{path}.{key}": shape for key, (_, shape) in keys.items()})
        return shapes


def innermost_first(parameters):
    """In the order in which layers go around them: a module after the modules in it."""
    return sorted(parameters, key=lambda target: -target.name.count("."))
