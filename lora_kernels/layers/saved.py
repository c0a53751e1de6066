"""``ModulesToSaveWrapper``: a module that each adapter trains and saves in full, in a copy of its own."""

import copy

from torch import nn

from .auxiliary import AuxiliaryTrainingWrapper
from .choice import freeze
from .mixed import Batch, run_saved


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """Calls the copy of the active adapter in ``modules_to_save``, or ``original_module``."""

    adapter_layer_names = ("modules_to_save",)

    def __init__(self, module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.tied = set()  # the adapters whose copy has the weight of the copy of the input embedding
        self.train(module.training)

    def adapter_names(self):
        """The adapters that have a copy."""
        return list(self.modules_to_save)

    def unwrap(self):
        """What stays when the wrapper goes: the copy in use, or the module as it was."""
        return self._current()

    def _current(self):
        active = [n for n in self._active_adapter if n in self.modules_to_save]
        return self.modules_to_save[active[0]] if active and not self._disable_adapters else self.original_module

    def forward(self, *args, **kwargs):
        batch = Batch(kwargs.pop("adapter_names")) if "adapter_names" in kwargs else self._rows.batch
        if batch is not None and not self._disable_adapters:
            return run_saved(self, batch, *args, **kwargs)
        return self._current()(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "modules_to_save" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._current(), name)

    def add(self, adapter_name, tied_to=None):
        """Gives an adapter its copy; frozen until :meth:`set_adapter`.

        ``tied_to``: the wrapper of the input embedding; the new copy has the weight of the copy there.
        """
        copied = {}  # what deepcopy takes as copied already
        if tied_to is not None:
            self.tied.add(adapter_name)
            copied = {id(self.original_module.weight): tied_to.modules_to_save[adapter_name].weight}
        self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module, copied).requires_grad_(False)

    def set_adapter(self, adapter_names, inference_mode=False):
        """Makes the copy of the adapter current and trainable; the base module when it has none."""
        self.check_set_adapter(adapter_names)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name in names and not inference_mode)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names, requires_grad=True):
        """Freezes or unfreezes the copies of the adapters named."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.modules_to_save:
                self.modules_to_save[name].requires_grad_(requires_grad)

    def _freeze(self, frozen):
        freeze(self.modules_to_save.parameters(), frozen)

    def enable_adapters(self, enabled):
        """Turns the copies off (the original module runs) or on again."""
        self._disable_adapters = not enabled

    def delete_adapter(self, adapter_name):
        """Removes the copy of an adapter, if it has one."""
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        self.tied.discard(adapter_name)
        self._active_adapter = [n for n in self._active_adapter if n != adapter_name]
