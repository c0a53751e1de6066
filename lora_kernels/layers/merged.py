"""``MergedWeight``: the updates that are in the weight of one layer, and how they get in and out.

Plain merges are sums: they come out again in any order, up to rounding. Exact merges are a stack, one residual each:
what is on top is decoded first, and what lay above a removed one is merged again, so that every bit comes back. A
weight holds one kind or the other.
"""

import warnings
from collections.abc import Sequence

import torch

from .. import ops
from ..ops import dispatch
from ..ops.checks import DTYPES
from ..ops.scalars import scaling_tensor
from ..ops.wide import wide
from . import apart
from .atomic import all_or_none


class MergedWeight:
    """The part of ``LoraLayer`` that writes to the base weight.

    ``_merged``: adapter -> the scaling it was merged with, the latest last. ``_residuals``: adapter ->
    :class:`MergeResidual`, for those that were merged exactly: all of them or none.
    """

    @property
    def residuals(self) -> dict[str, ops.MergeResidual]:
        """Adapter name to the :class:`MergeResidual` of its exact merge, in the order of merging."""
        return dict(self._residuals)

    def merge(
        self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None, *, exact: bool = False
    ) -> None:
        """Adds the updates of ``adapter_names`` (default: the active ones) to the base weight, in place.

        What is merged already stays as it is, with a warning.

        Args:
            safe_merge: refuse a result that would not be finite (an exact merge always does).
            exact: so that :meth:`unmerge` restores every bit (docs/residual_format.md); one pass for each adapter.

        Raises:
            ValueError: an adapter that is unknown, one merged in the other way, or a merged weight that would not be
                finite. The weight is then unchanged.
        """
        names = self.names_to_merge(adapter_names, exact)
        if not names:
            return
        if exact:
            target = [*self._merged.items(), *zip(names, self._current_scaling(names), strict=True)]
            all_or_none([self], lambda layer: layer._restack(target))
            return
        if apart.applies(self, names):
            if safe_merge and not apart.is_finite(self, names):
                raise ValueError("weight: the merged weight would hold Inf or NaN; nothing was changed")
            all_or_none([self], lambda layer: apart.add(layer, {name: layer.scaling[name] for name in names}))
            return
        weight, adapter = self.sum_to_merge(names)

        def add(layer):
            ops.merge_(weight, *adapter, safe=safe_merge)
            layer.note_merged(names)

        all_or_none([self], add)

    def sum_to_merge(self, names):
        """``weight, (lora_a, lora_b, scaling)``: what merging plain adapters, not merged yet, adds to what."""
        return self._matrices()[0], self._stacked(names, self._current_scaling(names))

    def note_merged(self, names):
        """The sum of ``names`` was added to the weight."""
        self._merged.update({name: self.scaling[name] for name in names})
        self._reroute()

    def unmerge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Takes the updates of ``adapter_names`` (default: all merged ones) out of the base weight again.

        Exactly merged ones leave the very bits that the weight had without them, in whatever order they go.

        Raises:
            ValueError: an adapter that is not merged; after an exact merge, a weight or an adapter that was changed
                since. The weight is then unchanged.
        """
        names = list(self._merged) if adapter_names is None else list(dict.fromkeys(adapter_names))
        if not names:
            warnings.warn("unmerge: no adapter is merged", stacklevel=2)
            return
        self._known_merged(names)
        if self._residuals:
            target = [(name, scale) for name, scale in self._merged.items() if name not in names]
            all_or_none([self], lambda layer: layer._restack(target))
            return
        if apart.applies(self, names):
            all_or_none([self], lambda layer: apart.take_out(layer, names))
            return
        weight, adapter = self.sum_to_take_out(names)

        def take_out(layer):
            ops.unmerge_(weight, *adapter)
            layer.note_taken_out(names)

        all_or_none([self], take_out)

    def sum_to_take_out(self, names):
        """``weight, (lora_a, lora_b, scaling)``: what unmerging plain adapters takes out of what."""
        return self._matrices()[0], self._stacked(names, [self._merged[name] for name in names])

    def note_taken_out(self, names):
        """The sum of ``names`` was taken out of the weight."""
        self._merged = {n: s for n, s in self._merged.items() if n not in names}
        self._reroute()

    def is_one_sum(self, names):
        """Whether merging or unmerging these adapters is one sum into one matrix that the ops of merging take."""
        return not (self._residuals or apart.applies(self, names)) and self.weight.dtype in DTYPES

    def switch(self, adapter_name, new=None):
        """``switch(new)`` replaces what is merged by ``new``; ``switch(old, new)`` only ``old``. ``new`` gets active.

        One pass over the weight; exactly where the merge was exact: the weight is then, bit for bit, what merging
        ``new`` into the original weight gives. What is trainable stays as it is.

        Raises:
            ValueError: nothing is merged, or an adapter is unknown, merged already or (``old``) not merged.
        """
        everything = new is None
        olds, new = (list(self._merged), adapter_name) if everything else ([adapter_name], new)
        self._known(new)
        if new in self._merged:
            raise ValueError(f"adapter_name: '{new}' is merged already")
        if not self._merged:
            raise ValueError("switch: no adapter is merged; call merge() first")
        self._known_merged(olds)
        if self._residuals:
            self._check_exact([new])
        if apart.applies(self, [new]):
            apart.check(self, [new])
        # The new one takes the place of the first that goes.
        target = []
        for name, scale in self._merged.items():
            if name == olds[0]:
                target.append((new, self.scaling[new]))
            elif name not in olds:
                target.append((name, scale))

        def switched(layer):
            if layer._residuals:
                layer._restack(target)
            elif apart.applies(layer, [new]):
                apart.become(layer, dict(target))
            else:
                old = layer._stacked(olds, [layer._merged[name] for name in olds])
                ops.switch_(layer._matrices()[0], old, layer._stacked([new], [layer.scaling[new]]))
                layer._merged = dict(target)
            layer._active_adapter = [new] if everything else replaced(layer._active_adapter, olds, new)
            layer._reroute()

        all_or_none([self], switched)

    def names_to_merge(self, adapter_names=None, exact=False):
        """The adapters ``merge(adapter_names=…)`` would add; ValueError when it would be refused."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names: expected a list of str, got {adapter_names!r}")
        names = [n for n in self._active_adapter if n in self.r] if adapter_names is None else list(adapter_names)
        for name in names:
            self._known(name)
        if self._merged:
            new = [name for name in names if name not in self._merged]
            if len(new) < len(names) or adapter_names is None:
                warn_of_merged(list(self._merged), new)
            names = new
        if names and self._merged and bool(self._residuals) != exact:
            raise ValueError(
                f"exact: {list(self._merged)} were merged with exact={not exact}; unmerge them before merging {names} "
                f"with exact={exact}"
            )
        if exact:
            self._check_exact(names)
        self._matrices()
        if apart.applies(self, names):
            apart.check(self, names)
        return list(dict.fromkeys(names))

    def _check_exact(self, names):
        """ValueError where an adapter does something else to its layer than ``W + ΔW``."""
        if self.several:
            raise ValueError(
                f"exact: a stack of matrices ({type(self).__name__}) is not merged exactly, use exact=False"
            )
        for name in names:
            for option in ("use_dora", "lora_bias"):
                if getattr(self, option, {}).get(name):
                    raise ValueError(
                        f"exact: adapter '{name}' has {option}=True; only W + ΔW is merged exactly, use exact=False"
                    )

    def merge_is_finite(self, adapter_names):
        """Whether the weight would be finite after merging; it is only read."""
        if apart.applies(self, adapter_names):
            return apart.is_finite(self, adapter_names)
        a, b, scale = self._stacked(adapter_names, self._current_scaling(adapter_names))
        weight = self._matrices()[0]
        check = dispatch.select("merge_is_finite", weight)
        return bool(check(weight, a, b, scaling_tensor(scale, weight), 1.0))

    def get_delta_weight(self, adapter):
        """``scaling · B A`` in the layout of the base weight."""
        self._known(adapter)
        a, b = self._matrix_factors(adapter)[0]
        return (b @ a) * self.scaling[adapter]

    def merge_state(self):
        """What :meth:`restore_merged` takes to come back here."""
        return dict(self._merged), bool(self._residuals), list(self._active_adapter)

    def restore_merged(self, state):
        """Merges and unmerges until the layer holds what it held at ``state``; after a failure half-way.

        Every bit of an exact merge comes back, residuals included; a plain one comes back up to rounding.
        """
        merged, exact, active = state
        if exact or self._residuals:
            self._restack(list(merged.items()))
        else:
            self._restore_plain(merged)
        self._active_adapter = active
        self._reroute()

    def _restore_plain(self, merged):
        if apart.applies(self, merged):
            apart.become(self, merged)
            return
        extra = {name: scale for name, scale in self._merged.items() if name not in merged}
        missing = {name: scale for name, scale in merged.items() if name not in self._merged}
        weight = self._matrices()[0]
        out, back = (self._stacked(list(t), list(t.values())) if t else None for t in (extra, missing))
        if out and back:
            ops.switch_(weight, out, back)
        elif out:
            ops.unmerge_(weight, *out)
        elif back:
            ops.merge_(weight, *back)
        self._merged = dict(merged)

    # The stack of exact merges

    def _restack(self, target):
        """Turns the stack into ``target``, ``[(name, scaling)]`` from the bottom up.

        Each step leaves weight and stack in step; what fails in between is for :func:`all_or_none` to take back.
        """
        target = [(name, float(scale)) for name, scale in target]
        now = list(self._merged.items())
        same = 0
        while same < min(len(now), len(target)) and now[same] == target[same]:
            same += 1
        while len(self._merged) > same + 1:
            self._pop()
        if len(self._merged) > same:
            if len(target) > same:
                self._pop(instead=target[same])
                same += 1
            else:
                self._pop()
        for name, scale in target[same:]:
            self._push(name, scale)
        self._reroute()

    def _push(self, name, scale):
        residual = ops.merge_exact_(self._matrices()[0], *self._exact_term(name, scale))
        self._merged[name], self._residuals[name] = scale, residual

    def _pop(self, instead=None):
        """Takes the top of the stack out; ``instead``, (name, scaling), goes in during the same pass."""
        name, scale = next(reversed(self._merged.items()))
        weight, old, residual = self._matrices()[0], self._exact_term(name, scale), self._residuals[name]
        if instead is None:
            ops.unmerge_exact_(weight, *old, residual)
        else:
            residual = ops.switch_exact_(weight, old, self._exact_term(*instead), residual)
        del self._merged[name], self._residuals[name]
        if instead is not None:
            self._merged[instead[0]], self._residuals[instead[0]] = instead[1], residual

    def _exact_term(self, name, scale):
        return self._stacked([name], [scale])

    def _known_merged(self, names):
        missing = [name for name in names if name not in self._merged]
        if missing:
            raise ValueError(f"adapter_names: {missing} not merged; merged: {list(self._merged)}")

    def _current_scaling(self, names):
        return [self.scaling[name] for name in names]

    def _stacked(self, names, scalings):
        """``lora_a, lora_b, scaling`` of several adapters as of one: ranks side by side, scaling inside b."""
        return self._as_one([self._matrix_factors(name)[0] for name in names], scalings)

    def _as_one(self, pairs, scalings):
        factors = [tuple(f.detach() for f in pair) for pair in pairs]
        if len(factors) == 1:
            return (*self._usable(*factors[0]), scalings[0])
        a = torch.cat([wide(a) for a, _ in factors], 0)
        b = torch.cat([wide(b) * scale for (_, b), scale in zip(factors, scalings, strict=True)], 1)
        return a, b, 1.0

    def _usable(self, *factors):
        """Factors in a dtype that the ops take: the one of the weight, or float32."""
        return tuple(f if f.dtype is torch.float32 or f.dtype is self.weight.dtype else f.float() for f in factors)


def warn_of_merged(merged, new):
    """As PEFT warns before merging the adapters ``new`` where ``merged`` are in the weights."""
    message = f"Already following adapters were merged {','.join(merged)}. "
    message += f"You are now additionally merging {','.join(new)}."
    warnings.warn(message if new else "All adapters are already merged, nothing to do.", stacklevel=4)


def replaced(names, olds, new):
    """``names`` with ``new`` instead of ``olds``: where the first of them was, or at the end."""
    kept = [new if name in olds else name for name in names if name != new]
    return list(dict.fromkeys([*kept, new]))
