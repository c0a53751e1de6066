"""``MergedWeight``: the updates that are in the weight of one layer, and how they get in and out."""

import warnings

import torch
from torch import nn

from .. import ops
from ..ops import dispatch
from ..ops.scalars import scaling_tensor


class MergedWeight:
    """The part of ``LoraLayer`` that writes to the base weight.

    ``_merged``: adapter -> the scaling it was merged with.
    """

    def merge(self, safe_merge=False, adapter_names=None):
        """Adds the updates of ``adapter_names`` (default: the active ones) to the base weight, in place.

        Raises:
            ValueError: an adapter that is unknown or merged already, or, with ``safe_merge``, a merged weight
                that would not be finite. The weight is then unchanged.
        """
        names = self.names_to_merge(adapter_names)
        if names:
            a, b, scale = self._stacked(names, self._current_scaling(names))
            ops.merge_(self._plain_weight(), a, b, scale, safe=safe_merge)
            self._merged.update({name: self.scaling[name] for name in names})
        self._reroute()

    def unmerge(self, adapter_names=None):
        """Takes the updates of ``adapter_names`` (default: all merged ones) out of the base weight again."""
        names = list(self._merged) if adapter_names is None else list(dict.fromkeys(adapter_names))
        if not names:
            warnings.warn("unmerge: no adapter is merged", stacklevel=2)
            return
        self._known_merged(names)
        a, b, scale = self._stacked(names, [self._merged[name] for name in names])
        ops.unmerge_(self._plain_weight(), a, b, scale)
        for name in names:
            del self._merged[name]
        self._reroute()

    def switch(self, adapter_name):
        """Replaces what is merged by ``adapter_name``, in one pass over the weight, and makes it active.

        What is trainable stays as it is. ValueError when nothing is merged, or the adapter is unknown or merged.
        """
        self._known(adapter_name)
        if adapter_name in self._merged:
            raise ValueError(f"adapter_name: '{adapter_name}' is merged already")
        if not self._merged:
            raise ValueError("switch: no adapter is merged; call merge() first")
        old = self._stacked(list(self._merged), list(self._merged.values()))
        new = self._stacked([adapter_name], self._current_scaling([adapter_name]))
        ops.switch_(self._plain_weight(), old, new)
        self._merged = {adapter_name: self.scaling[adapter_name]}
        self._active_adapter = [adapter_name]
        self._reroute()

    def names_to_merge(self, adapter_names=None):
        """The adapters ``merge(adapter_names=…)`` would add; ValueError when it would be refused."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names: expected a list of str, got {adapter_names!r}")
        names = [n for n in self._active_adapter if n in self.r] if adapter_names is None else list(adapter_names)
        for name in names:
            self._known(name)
        merged = [name for name in names if name in self._merged]
        if merged:
            raise ValueError(f"adapter_names: {merged} merged already; unmerge first")
        self._plain_weight()
        return list(dict.fromkeys(names))

    def merge_is_finite(self, adapter_names):
        """Whether the weight would be finite after merging; it is only read."""
        a, b, scale = self._stacked(adapter_names, self._current_scaling(adapter_names))
        weight = self._plain_weight()
        check = dispatch.select("merge_is_finite", weight)
        return bool(check(weight, a, b, scaling_tensor(scale, weight), 1.0))

    def get_delta_weight(self, adapter):
        """``scaling · B A`` in the layout of the base weight: (out_features, in_features), or (V, d)."""
        self._known(adapter)
        a, b = self._factors(adapter)
        return (b @ a) * self.scaling[adapter]

    def merge_state(self):
        """What :meth:`restore_merged` takes to come back here."""
        return dict(self._merged), list(self._active_adapter)

    def restore_merged(self, state):
        """Merges and unmerges until the layer holds what it held at ``state``; after a failure half-way."""
        merged, active = state
        extra = [name for name in self._merged if name not in merged]
        if extra:
            self.unmerge(extra)
        missing = [name for name in merged if name not in self._merged]
        if missing:
            a, b, scale = self._stacked(missing, [merged[name] for name in missing])
            ops.merge_(self._plain_weight(), a, b, scale)
            self._merged.update({name: merged[name] for name in missing})
        self._active_adapter = active
        self._reroute()

    def _known_merged(self, names):
        missing = [name for name in names if name not in self._merged]
        if missing:
            raise ValueError(f"adapter_names: {missing} not merged; merged: {list(self._merged)}")

    def _current_scaling(self, names):
        return [self.scaling[name] for name in names]

    def _plain_weight(self):
        weight = self.base_layer._parameters.get("weight")
        if weight.__class__ is not nn.Parameter:
            kind = "computed (parametrized) weight" if weight is None else type(weight).__name__
            raise ValueError(f"weight: a {kind} can not be merged into; expected a plain parameter")
        return weight.detach()

    def _stacked(self, names, scalings):
        """``lora_a, lora_b, scaling`` of several adapters as of one: ranks side by side, scaling inside b."""
        factors = [tuple(f.detach() for f in self._factors(name)) for name in names]
        if len(names) == 1:
            return (*self._usable(*factors[0]), scalings[0])
        a = torch.cat([a.float() for a, _ in factors], 0)
        b = torch.cat([b.float() * scale for (_, b), scale in zip(factors, scalings, strict=True)], 1)
        return a, b, 1.0

    def _usable(self, *factors):
        """Factors in a dtype that the ops take: the one of the weight, or float32."""
        dtype = self.base_layer.weight.dtype
        return tuple(f if f.dtype in (dtype, torch.float32) else f.float() for f in factors)
