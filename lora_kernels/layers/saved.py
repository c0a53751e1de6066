"""``ModulesToSaveWrapper``: a module that each adapter trains and saves in full, in a copy of its own."""

import copy

from torch import nn

from .mixed import Batch, Rows, run_saved


class ModulesToSaveWrapper(nn.Module):
    """Calls the copy of the active adapter in ``modules_to_save``, or ``original_module``."""

    adapter_layer_names = ("modules_to_save",)
    other_param_names = ()
    merged_adapters = ()
    merged = False

    def __init__(self, module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self._active_adapter = []
        self._disable_adapters = False
        self._rows = Rows()
        self.train(module.training)

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

    @property
    def active_adapters(self):
        return list(self._active_adapter)

    @property
    def disable_adapters(self):
        return self._disable_adapters

    def add(self, adapter_name):
        """Gives an adapter its copy; frozen until :meth:`set_adapter`."""
        self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module).requires_grad_(False)

    def check_set_adapter(self, adapter_names):
        """ValueError when two of the adapters have a copy: there is no way to choose."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        mine = [n for n in names if n in self.modules_to_save]
        if len(mine) > 1:
            raise ValueError(f"adapter_name: {mine} each save this module in full; only one of them can be active")

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

    def enable_adapters(self, enabled):
        """Turns the copies off (the original module runs) or on again."""
        self._disable_adapters = not enabled

    def delete_adapter(self, adapter_name):
        """Removes the copy of an adapter, if it has one."""
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        self._active_adapter = [n for n in self._active_adapter if n != adapter_name]
