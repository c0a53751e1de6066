"""``LoraModel``: the adapters of a model, wrapped around its layers, and their life."""

import warnings

from torch import nn

from .choosing import ModelChoosing
from .combine import ModelCombining
from .layers import (
    AuxiliaryTrainingWrapper,
    LoraLayer,
    LoraParameter,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
)
from .layers.base import check_adapter_name
from .layers.grouped import group_siblings
from .layers.mixed import Rows
from .layers.tied import Tie, tie_equal
from .merging import ModelMerging
from .parameter_targets import check_same, full_name, innermost_first
from .targeting import find_targets
from .tuner_facts import TunerFacts
from .tying import names_tied_to_embedding, note_untied
from .unfuse import fused_paths, turn_off
from .walk import each_module, submodule


class LoraModel(TunerFacts, ModelChoosing, ModelMerging, ModelCombining, nn.Module):
    """Wraps, in place, the layers of ``model`` that ``config`` names; ``self.model`` is that model.

    Raises:
        ValueError, TypeError: nothing to wrap, a taken or unusable name; the model is then unchanged.
    """

    def __init__(self, model, config, adapter_name="default", *, autocast_adapter_dtype=True, meta=False):
        super().__init__()
        self.model = model
        self.peft_config = {}
        self._active = [adapter_name]
        self._fused = []
        self._frozen = []  # what disable_adapter_layers froze
        self._rows = Rows()
        self.targeted_module_names = []  # of all adapters, in the order they came
        self.targeted_parameter_names = []
        before = self._parts()
        targets = self._take_over(before, config, adapter_name) if before else None
        self.add_adapter(
            adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype, meta=meta, targets=targets
        )
        if before:
            self.set_adapter(adapter_name, config.inference_mode)
        if not hasattr(type(self.model), "peft_config"):  # a PeftModel has its own
            self.model.peft_config = self.peft_config  # as in PEFT: libraries look for it

    def _take_over(self, parts, config, adapter_name):
        """Adapters that the model has already stay, but where the new one takes the place of one of its name."""
        targets = find_targets(self.model, config)
        self.check_not_merged([adapter_name], "replace")
        taken = {id(module) for module in [*(t.module for t in targets.lora), *(m for _, m in targets.saved)]}
        for part in parts:
            part._rows = self._rows
            if id(part) in taken and (isinstance(part, AuxiliaryTrainingWrapper) or adapter_name in part.r):
                part.delete_adapter(adapter_name)
        self.peft_config = self.model.__dict__.get("peft_config", {})
        self.peft_config.pop(adapter_name, None)
        return targets

    @classmethod
    def around(cls, model, peft_config):
        """The tuner of a model that has adapters in it already; ``peft_config`` is its dict of configs."""
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner.model, tuner.peft_config, tuner._fused = model, peft_config, []
        tuner._frozen = []
        parts = tuner._parts()
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
        tuner.targeted_module_names = [n for n, m in layers if not isinstance(m, LoraParameter)]
        tuner.targeted_parameter_names = [
            full_name(n, m.parameter_name) for n, m in layers if isinstance(m, LoraParameter)
        ]
        layer = next((part for part in parts if isinstance(part, LoraLayer)), parts[0])
        tuner._active, tuner._rows = layer.active_adapters, layer._rows
        return tuner

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def __setstate__(self, state):
        super().__setstate__(state)
        for layer in self.lora_layers():  # a copied parameter has a storage of its own
            for tie in layer._ties:
                tie.renew()

    @property
    def active_adapters(self):
        """The names of the active adapters."""
        return list(self._active)

    @property
    def active_adapter(self):
        """The name of the active adapter; a list of names where several are."""
        return self._active[0] if len(self._active) == 1 else list(self._active)

    def lora_layers(self):
        """The LoRA layers of the model."""
        return [part for part in self._parts() if isinstance(part, LoraLayer)]

    def _parts(self):
        """The LoRA layers, and the wrappers of what is trained beside, in the order of the model; below only LoRA."""
        parts, seen, stack = [], set(), [self.model]
        while stack:
            module = stack.pop()
            if module is None or module in seen:
                continue
            seen.add(module)
            children = module._modules
            if isinstance(module, LoraLayer):
                parts.append(module)
                if children["base_layer"]._modules:
                    stack.append(children["base_layer"])
            elif isinstance(module, AuxiliaryTrainingWrapper):
                parts.append(module)
            elif children:
                stack.extend(reversed(children.values()))
        return parts

    def _get_module_names_tied_with_embedding(self):
        """As in PEFT: what ``ensure_weight_tying`` ties."""
        return names_tied_to_embedding(self.model)

    # Adding and removing

    def add_adapter(self, adapter_name, config, *, autocast_adapter_dtype=True, meta=False, targets=None):
        """Adds an adapter; it is not made active, unless it is the first one."""
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            taken = f"the name is taken; adapters: {list(self.peft_config)}"
            raise ValueError(f"Adapter with name '{adapter_name}' already exists: {taken}")
        if config.bias not in ("none", "all", "lora_only"):
            raise NotImplementedError(f"Requested bias: {config.bias}, is not implemented.")
        if config.bias != "none" and any(other.bias != "none" for other in self.peft_config.values()):
            raise ValueError(
                "LoraModel supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' for all "
                f"adapters, got {config.bias!r} (base biases are shared)"
            )
        check_same(self.peft_config, config)
        targets = find_targets(self.model, config) if targets is None else targets
        self._inject(adapter_name, targets, autocast_adapter_dtype, meta)
        first = not self.peft_config
        config.__dict__.update(targets.config.__dict__)  # the caller's config tells what was found, as in PEFT
        self.peft_config[adapter_name] = config
        names = [target.name for target in targets.lora]
        self.targeted_module_names = list(dict.fromkeys([*self.targeted_module_names, *names]))
        names = [target.full_name for target in targets.parameters]
        self.targeted_parameter_names = list(dict.fromkeys([*self.targeted_parameter_names, *names]))
        if first:
            self._freeze_base(targets.config.bias)
        beside = [wrapper for _, wrapper in targets.saved] + [target.module for target in targets.tokens]
        for wrapper in beside if adapter_name in self._active else ():
            wrapper.set_adapter(self._active, targets.config.inference_mode)

    def _inject(self, adapter_name, targets, autocast_adapter_dtype, meta):
        config, undo, layers = targets.config, [], {}
        options = {
            "lora_dropout": config.lora_dropout,
            "init_lora_weights": config.init_lora_weights,
            "use_rslora": config.use_rslora,
            "use_dora": config.use_dora,
            "lora_bias": config.lora_bias,
            "autocast_adapter_dtype": autocast_adapter_dtype,
            "inference_mode": config.inference_mode,
            "device": "meta" if meta else None,
        }
        disabled = any(layer.disable_adapters for layer in self._parts())

        def give(target, layer, old, **changed):
            if old is not layer:
                undo.append((layer.unwrap,))
                layer.__dict__.update(_active_adapter=self.active_adapters, _rows=self._rows)
                if disabled:
                    layer.enable_adapters(False)
            undo.append((layer._drop, adapter_name))
            replaced = layer.update_layer(adapter_name, target.r, target.lora_alpha, **{**options, **changed})
            if replaced is not None:
                undo.append((setattr, layer.weight, "data", replaced))
            self._replace(target.name, old, layer, undo)

        try:
            for target in targets.lora:
                old = target.module
                layer = old if isinstance(old, LoraLayer) else target.layer_class(old)
                give(target, layer, old, init_lora_weights=target.start(config.init_lora_weights))
                layers[target.name] = layer
                if target.tied_to is not None:
                    leader = self.model.get_submodule(target.tied_to)
                    Tie(adapter_name, leader, layer, start=config.init_lora_weights is not False)
            self._inject_beside(adapter_name, targets, (autocast_adapter_dtype, options["device"]), disabled, undo)
            for target in innermost_first(targets.parameters):
                old = target.layer or self.model.get_submodule(target.name)
                give(target, target.layer or LoraParameter(old, target.parameter), old)
            self._unfuse(undo)
            group_siblings(layers)
        except BaseException:
            for function, *arguments in reversed(undo):
                function(*arguments)
            raise

    def _inject_beside(self, adapter_name, targets, rows, disabled, undo):
        """What the adapter trains beside LoRA: modules in full, and rows of embeddings."""
        for index, (name, module) in enumerate(targets.saved):
            wrapper = module if isinstance(module, ModulesToSaveWrapper) else ModulesToSaveWrapper(module)
            embedding = targets.saved_tied.get(name)
            tied_to = None if embedding is None else self.model.get_submodule(embedding)
            self._inject_wrapper(name, module, wrapper, disabled, undo, (adapter_name, tied_to))
            targets.saved[index] = (name, wrapper)
        for target in targets.tokens:
            wrapper = target.module
            if not isinstance(wrapper, TrainableTokensWrapper):
                leader = None if target.tied_to is None else self.model.get_submodule(target.tied_to).token_adapter
                wrapper = TrainableTokensWrapper(target.module, leader)
            added = adapter_name, target.indices, *rows
            self._inject_wrapper(target.name, target.module, wrapper, disabled, undo, added)
            target.module = wrapper

    def _inject_wrapper(self, name, module, wrapper, disabled, undo, added):
        wrapper._rows = self._rows
        wrapper.enable_adapters(not disabled)
        undo.append((wrapper.delete_adapter, added[0]))
        wrapper.add(*added)
        self._replace(name, module, wrapper, undo)

    def _unfuse(self, undo):
        """Turns off torch's fused encoder path, which reads the weights of linear layers without calling them."""
        for path in fused_paths(each_module(self.model, LoraLayer), LoraLayer):
            undo.append((setattr, *path))
            undo.append((self._fused.remove, path))
            self._fused.append(path)
            turn_off(path)

    def _replace(self, name, old, new, undo):
        if new is not old:
            path, _, attribute = name.rpartition(".")
            parent = submodule(self.model, path)
            undo.append((setattr, parent, attribute, old))
            if type(parent).__setattr__ is nn.Module.__setattr__ and parent._modules.get(attribute) is old:
                parent._modules[attribute] = new
            else:
                setattr(parent, attribute, new)

    def _freeze_base(self, bias):
        """Only the adapter trains, and the base biases that ``bias`` names."""
        done = set()
        for module in each_module(self.model, LoraLayer):
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in done:
                    done.add(id(parameter))
                    parameter.requires_grad = bias == "all" and name == "bias"
        for part in self._parts():
            if isinstance(part, AuxiliaryTrainingWrapper):
                part.original_module.requires_grad_(False)
            elif bias == "lora_only" and getattr(part.base_layer, "bias", None) is not None:
                part.bias.requires_grad_(True)

    def delete_adapter(self, adapter_name):
        """Removes an adapter. ValueError when it is unknown or merged."""
        self._known([adapter_name], "does not exist")
        self.check_not_merged([adapter_name], "delete")
        for part in self._parts():
            if isinstance(part, AuxiliaryTrainingWrapper) or adapter_name in part.r:
                part.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        active = [n for n in self._active if n != adapter_name]
        if not active and self.peft_config:
            active = sorted(self.peft_config)[:1]
            warnings.warn(f"'{adapter_name}' was active and is deleted; '{active[0]}' is active now", stacklevel=3)
        if adapter_name in self._active:
            self._activate(active)

    def check_not_merged(self, names, action):
        """ValueError when one of the adapters is in the weights."""
        merged = sorted({name for layer in self._merging() for name in layer.merged_adapters} & set(names))
        if merged:
            raise ValueError(f"Cannot {action} adapter(s) {merged} while they are merged. Please unmerge them first.")

    def _known(self, names, problem="not found"):
        unknown = [n for n in names if n not in self.peft_config]
        if unknown:
            known = f"no adapter {unknown}; adapters: {list(self.peft_config)}"
            raise ValueError(f"Adapter {unknown[0]} {problem}: {known}")

    # Taking apart

    def merge_and_unload(self, progressbar=False, safe_merge=False, adapter_names=None):
        """Merges and takes all wrappers away: returns the plain model, no module of ours left in it."""
        if adapter_names is not None or set(self._active) - {n for x in self._merging() for n in x.merged_adapters}:
            self.merge_adapter(adapter_names, safe_merge, progressbar)
        tie_equal(self._weighted())
        model = self.unload()
        note_untied(model)
        return model

    def unload(self):
        """Takes all wrappers away without merging: returns the plain model."""
        for name, part in reversed([(n, m) for n, m in self.model.named_modules() if n]):
            if isinstance(part, (LoraLayer, AuxiliaryTrainingWrapper)):
                self._replace(name, part, part.unwrap(), [])
        for module, attribute, value in self._fused:
            setattr(module, attribute, value)
        self._fused = []
        self.model.__dict__.pop("peft_config", None)
        return self.model


def has_adapters(model):
    """Whether adapters of this package are somewhere in the model. TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return any(isinstance(module, (LoraModel, LoraLayer)) for module in model.modules())


def check_takes_over(model, adapter_name, targets):
    """ValueError where an adapter that is loaded would take part beside an older one of its name: one in a model that
    is wrapped, or in a module that the loaded one does not reach."""
    if any(isinstance(module, LoraModel) for module in model.modules()):
        raise ValueError("model: has adapters already; load_adapter() adds another, unload() removes them")
    taken = {id(module) for module in [*(t.module for t in targets.lora), *(m for _, m in targets.saved)]}
    left = [
        name
        for name, part in model.named_modules()
        if id(part) not in taken
        and adapter_name in (part.r if isinstance(part, LoraLayer) else getattr(part, "_adapters", ()))
    ]
    if left:
        raise ValueError(
            f"model: has adapters already, one of the name {adapter_name!r} where the loaded one has none "
            f"({', '.join(left[:5])}{', ...' if left[5:] else ''}): both would take part; unload() removes them, "
            "another adapter_name keeps them apart"
        )
