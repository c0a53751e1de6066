"""``AdapterChoice``: which adapters of a layer are active, trained and enabled, and how strongly they count."""

import math
import warnings

_MAGNITUDES = ("lora_magnitude_vector",)


def freeze(parameters, frozen):
    """Stops the training of parameters; those that trained are appended to ``frozen``."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.requires_grad = False
            frozen.append(parameter)


def choose(layers, names, trained):
    """Makes ``names`` active and ``trained`` trainable in layers that are not merged; they share the list."""
    for layer in layers:
        state = layer.__dict__  # nn.Module's ways to read and set attributes would be most of the cost
        modules = state["_modules"]
        kinds = layer._module_kinds
        for kind in kinds + _MAGNITUDES if True in state["use_dora"].values() else kinds:
            for name, module in modules[kind].__dict__["_modules"].items():
                wanted = name in trained
                for factor in module.__dict__["_parameters"].values():
                    if factor is not None:
                        factor.requires_grad = wanted
        for kind in layer._parameter_kinds:
            for name, factor in modules[kind].__dict__["_parameters"].items():
                factor.requires_grad = name in trained
        state["_active_adapter"] = names
        layer._reroute()


class AdapterChoice:
    """The part of ``LoraLayer`` that chooses among its adapters."""

    _module_kinds = ("lora_A", "lora_B")  # where the factors of this kind of layer are, beside magnitudes
    _parameter_kinds = ()

    def set_adapter(self, adapter_names, inference_mode=False):
        """Makes one adapter (or a list of them) active and trainable, all others inactive and frozen.

        Names that this layer does not have are ignored: an adapter need not touch every layer. A merged layer
        is unmerged first, with a warning.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        if self._merged:
            warnings.warn("set_adapter: the layer is merged; it is unmerged first", stacklevel=2)
            self.unmerge()
        choose((self,), names, () if inference_mode else names)

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
        state = self.__dict__
        modules = state["_modules"]
        kinds = self._module_kinds
        for kind in kinds + _MAGNITUDES if True in state["use_dora"].values() else kinds:
            for module in modules[kind].__dict__["_modules"].values():
                for factor in module.__dict__["_parameters"].values():
                    if factor is not None and factor.requires_grad:
                        factor.requires_grad = False
                        frozen.append(factor)
        for kind in self._parameter_kinds:
            freeze(modules[kind].__dict__["_parameters"].values(), frozen)

    def enable_adapters(self, enabled):
        """Turns the adapters off (the layer then gives what the base layer alone does) or on again."""
        self.__dict__["_disable_adapters"] = not enabled
        self._reroute()

    def set_scale(self, adapter, scale):
        """Sets the scaling to ``scale`` times the one that ``lora_alpha`` and ``r`` give."""
        self._known(adapter)
        self.scaling[adapter] = scale * self._own_scaling(adapter)

    def supports_lora_conversion(self, adapter_name="default"):
        """Whether ``convert_to_lora`` takes an adapter of this layer: a plain update of a linear layer."""
        return False

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
