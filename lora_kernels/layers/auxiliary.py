"""``AuxiliaryTrainingWrapper``: what stands around a module that an adapter trains beside its low-rank updates."""

from torch import nn

from .mixed import Rows


class AuxiliaryTrainingWrapper(nn.Module):
    """The choice of adapter that the two kinds share: modules saved in full, and trainable token rows.

    Only one of the active adapters can have something here: there is no way to choose between two. A kind says which
    adapters have (``adapter_names``).
    """

    adapter_layer_names = ()
    other_param_names = ()
    merged_adapters = ()
    merged = False

    def __init__(self):
        super().__init__()
        self._active_adapter = []
        self._disable_adapters = False
        self._rows = Rows()

    @property
    def active_adapters(self):
        return [name for name in self._active_adapter if name in self.adapter_names()]

    @property
    def _adapters(self):  # PEFT's name, which libraries look at
        return set(self.adapter_names())

    @property
    def disable_adapters(self):
        return self._disable_adapters

    def check_set_adapter(self, adapter_names):
        """ValueError when two of the adapters have something here."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        mine = [n for n in names if n in self.adapter_names()]
        if len(mine) > 1:
            raise ValueError(
                f"Only one adapter can be set at a time for {type(self).__name__}, got {len(mine)}: adapter_name: "
                f"{mine} each have this module for themselves; only one of them can be active"
            )
