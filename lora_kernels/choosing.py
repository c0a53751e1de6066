"""``ModelChoosing``: the part of :class:`~lora_kernels.tuner.LoraModel` that chooses which adapters a model runs,
trains, switches off, or takes row by row."""

import warnings

from .layers import AuxiliaryTrainingWrapper, LoraLayer
from .layers.choice import choose
from .layers.mixed import BASE, Batch


class ModelChoosing:
    """What :meth:`set_adapter` and its kin do to every layer; ``LoraModel`` has the layers and the configs."""

    def set_adapter(self, adapter_name, inference_mode=False):
        """Makes one adapter, or a list of them, active and (without ``inference_mode``) trainable.

        Merged layers are unmerged first, with a warning. ValueError when a name is unknown.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        self._known(names)
        parts, merged = self._parts(), False
        for part in parts:
            if isinstance(part, AuxiliaryTrainingWrapper):
                part.check_set_adapter(names)
            merged = merged or part.merged
        if merged:
            warnings.warn("set_adapter: the model is merged; it is unmerged first", stacklevel=3)
            self.unmerge_adapter()
        self._activate(names, inference_mode, parts)

    def _activate(self, names, inference_mode=False, parts=None):
        trained = () if inference_mode else names
        unmerged = []
        for part in self._parts() if parts is None else parts:
            if isinstance(part, LoraLayer) and not part._merged:
                unmerged.append(part)
            else:
                part.set_adapter(names, inference_mode)
        choose(unmerged, list(names), trained)
        self._active, self._frozen = list(names), []

    def set_requires_grad(self, adapter_names, requires_grad=True):
        """Freezes or unfreezes adapters, active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._known(names)
        for part in self._parts():
            part.set_requires_grad(names, requires_grad)

    def enable_adapter_layers(self):
        """The adapters take part again, and what trained before trains again."""
        self._enable(self._parts())

    def _enable(self, parts):
        for part in parts:
            part.enable_adapters(True)
        for parameter in self._frozen:
            parameter.requires_grad = True
        self._frozen = []

    def disable_adapter_layers(self):
        """The model gives what it gave without adapters (but for base biases that were trained); they do not train."""
        self._disable(self._parts())

    def _disable(self, parts):
        biased = [n for n in self._active if self.peft_config[n].bias != "none"]
        if biased:
            warnings.warn(f"adapters {biased} trained base biases, which stay as they are", stacklevel=4)
        frozen = self._frozen
        for part in parts:
            part.enable_adapters(False)
            part._freeze(frozen)

    def row_adapters(self, adapter_names, num_beams=None):
        """A context in which each sample of a batch takes its own adapter, "__base__" none (in eval mode).

        Raises:
            ValueError: the model is in training mode, or an adapter is unknown.
        """
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {BASE})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        copies = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
        if copies > 1 and not isinstance(adapter_names, (list, tuple)):
            raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
        return self._rows.hold(Batch(adapter_names, copies))
