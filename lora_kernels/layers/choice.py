"""``AdapterChoice``: which adapters of a layer are active, trained and enabled, and how strongly they count."""

import math
import warnings

_MODULE_KINDS = ("lora_A", "lora_B", "lora_magnitude_vector")
_PARAMETER_KINDS = ("lora_embedding_A", "lora_embedding_B")


def freeze(parameters, frozen):
    """Stops the training of parameters; those that trained are appended to ``frozen``."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.requires_grad = False
            frozen.append(parameter)


class AdapterChoice:
    """The part of ``LoraLayer`` that chooses among its adapters."""

    def set_adapter(self, adapter_names, inference_mode=False):
        """Makes one adapter (or a list of them) active and trainable, all others inactive and frozen.

        Names that this layer does not have are ignored: an adapter need not touch every layer. A merged layer
        is unmerged first, with a warning.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        if self._merged:
            warnings.warn("set_adapter: the layer is merged; it is unmerged first", stacklevel=2)
            self.unmerge()
        self._choose(names, () if inference_mode else names)

    def _choose(self, names, trained):
        """Makes ``names`` active and ``trained`` trainable. Nothing is merged; ``names`` may be shared by layers."""
        state = self.__dict__  # nn.Module's ways to read and set attributes would be most of the cost
        modules = state["_modules"]
        for kind in _MODULE_KINDS:
            for name, module in modules[kind].__dict__["_modules"].items():
                wanted = name in trained
                for factor in module.__dict__["_parameters"].values():
                    if factor is not None:
                        factor.requires_grad = wanted
        for kind in _PARAMETER_KINDS:
            for name, factor in modules[kind].__dict__["_parameters"].items():
                factor.requires_grad = name in trained
        state["_active_adapter"] = names
        self._reroute()

    def set_requires_grad(self, adapter_names, requires_grad=True):
        """Freezes or unfreezes the factors of the adapters named."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for factor in self._parameters_of(name):
                if factor is not None:
                    factor.requires_grad_(requires_grad)

    def _parameters_of(self, adapter_name):
        for kind in self.adapter_layer_names:
            entries = self._modules[kind]
            if adapter_name in entries._modules:
                yield from entries._modules[adapter_name]._parameters.values()
            elif adapter_name in entries._parameters:
                yield entries._parameters[adapter_name]

    def _freeze(self, frozen):
        """Stops the training of all factors; those that trained are appended to ``frozen``."""
        modules = self.__dict__["_modules"]
        for kind in _MODULE_KINDS:
            for module in modules[kind].__dict__["_modules"].values():
                for factor in module.__dict__["_parameters"].values():
                    if factor is not None and factor.requires_grad:
                        factor.requires_grad = False
                        frozen.append(factor)
        for kind in _PARAMETER_KINDS:
            if factors := modules[kind].__dict__["_parameters"]:
                freeze(factors.values(), frozen)

    def enable_adapters(self, enabled):
        """Turns the adapters off (the layer then gives what the base layer alone does) or on again."""
        self.__dict__["_disable_adapters"] = not enabled
        self._reroute()

    def set_scale(self, adapter, scale):
        """Sets the scaling to ``scale`` times the one that ``lora_alpha`` and ``r`` give."""
        self._known(adapter)
        self.scaling[adapter] = scale * self._own_scaling(adapter)

    def scale_layer(self, scale):
        """Multiplies the scaling of the active adapters by ``scale``."""
        for name in self._active_adapter:
            if name in self.r:
                self.scaling[name] = self.scaling[name] * scale

    def unscale_layer(self, scale=None):
        """Divides the scaling of the active adapters by ``scale``, or restores it when None."""
        for name in self._active_adapter:
            if name in self.r:
                self.scaling[name] = self._own_scaling(name) if scale is None else self.scaling[name] / scale

    def _own_scaling(self, name):
        r = self.r[name]
        return self.scaling_factor * self.lora_alpha[name] / (math.sqrt(r) if self.use_rslora[name] else r)
