"""``ModelMerging``: merge, unmerge and switch over all layers of a model, or over none of them."""

import warnings

from . import ops
from .layers import LoraLayer, TrainableTokensLayer, TrainableTokensWrapper
from .layers.atomic import Together, all_or_none
from .layers.merged import replaced, warn_of_merged
from .layers.tied import part, rejoin
from .tying import warn_of_tied_targets
from .walk import named_modules


class _Sums:
    """The layers of ``work``, layer -> adapter names, in which these go in or out as one sum into one matrix.

    Args:
        op: ``merge_list_`` or ``unmerge_list_``: one call for all of them.
        terms, note: the names of the methods of a layer that say what is summed, and take note of it afterwards.
    """

    def __init__(self, work, op, terms, note):
        self.work = {x: names for x, names in work.items() if isinstance(x, LoraLayer) and x.is_one_sum(names)}
        self.op, self.terms, self.note = op, terms, note

    def add(self):
        """All of them, or none and False: one is refused, and merging one by one says which."""
        try:
            sums = [getattr(layer, self.terms)(names) for layer, names in self.work.items()]
            self.op([weight for weight, _ in sums], [adapter for _, adapter in sums])
        except (TypeError, ValueError):
            return False
        for layer, names in self.work.items():
            getattr(layer, self.note)(names)
        return True


class ModelMerging:
    """The part of ``LoraModel`` that writes to weights.

    After any error or interrupt all layers are as before: bit for bit where merges are exact, else up to rounding.
    """

    def merge_adapter(self, adapter_names=None, safe_merge=False, progressbar=False, *, exact=False):
        """Adds the updates of adapters (default: the active ones) to the weights, in place.

        What is merged already stays as it is, with a warning.

        Args:
            adapter_names: list of str.
            safe_merge: look at all layers first, and refuse weights that would not be finite.
            progressbar: a ``tqdm`` bar over the layers.
            exact: merge so that :meth:`unmerge_adapter` restores every bit of every weight. A layer keeps a residual
                for each adapter (0.05 to 1 bits a weight, ``layer.residuals``), and the adapters must stay as they
                are until then. Never leaves Inf or NaN.

        Raises:
            ValueError: an adapter that is unknown, one merged in the other way, token rows that two adapters have in
                common, or, with ``safe_merge``, weights that would not be finite. Nothing was written.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names: expected a list of str, got {adapter_names!r}")
        weighted = self._weighted()
        layers = self._merging(weighted)
        merged = {n for layer in layers for n in layer.merged_adapters}
        names = list(self._active if adapter_names is None else adapter_names)
        self._known(names)
        work = {x: [n for n in names if n in x.adapter_names() and n not in x.merged_adapters] for x in layers}
        work = {layer: found for layer, found in work.items() if found}
        if merged:
            warn_of_merged(sorted(merged), list(dict.fromkeys(n for found in work.values() for n in found)))
        plain = [layer for layer in layers if work and isinstance(layer, LoraLayer)]
        if any(layer.merged and bool(layer.residuals) != exact for layer in plain):
            raise ValueError(
                f"exact: {sorted(merged)} were merged with exact={not exact}; unmerge them before merging {names} "
                f"with exact={exact}"
            )
        work = {layer: layer.names_to_merge(found, exact) for layer, found in work.items()}
        if safe_merge:
            for layer, found in work.items():
                if not layer.merge_is_finite(found):
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {', '.join(found)} seems to be broken: "
                        f"safe_merge: merging {found} would leave Inf or NaN in '{self._path(layer)}'"
                    )
        warn_of_tied_targets(self)
        part(work, self.model)
        one_by_one = exact or progressbar
        self._all_or_none(
            list(work),
            lambda layer: layer.merge(adapter_names=work[layer], exact=exact),
            weighted,
            progressbar,
            together=None if one_by_one else _Sums(work, ops.merge_list_, "sum_to_merge", "note_merged"),
        )

    def unmerge_adapter(self, adapter_names=None):
        """Takes merged updates (default: all of them) out of the weights again.

        Those merged exactly leave the very bits that the weights have without them, in whatever order they go.

        Raises:
            ValueError: an adapter that is unknown or not merged; after an exact merge, a weight or an adapter that
                was changed since.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names: expected a list of str, got {adapter_names!r}")
        weighted = self._weighted()
        layers = [layer for layer in self._merging(weighted) if layer.merged]
        if adapter_names is not None:
            names = list(dict.fromkeys(adapter_names))
            self._known(names)
            self._known_merged(names, layers)
            layers = [layer for layer in layers if set(names) & set(layer.merged_adapters)]
        elif not layers:
            warnings.warn("unmerge_adapter: no adapter is merged", stacklevel=3)
        merged = {layer: list(layer.merged_adapters) for layer in layers}
        work = {x: m if adapter_names is None else [n for n in names if n in m] for x, m in merged.items()}
        sums = _Sums(work, ops.unmerge_list_, "sum_to_take_out", "note_taken_out")
        self._all_or_none(layers, lambda layer: layer.unmerge(work[layer]), weighted, together=sums)

    def switch_adapter(self, adapter_name, new=None):
        """``switch_adapter("new")`` replaces all that is merged, ``switch_adapter("old", "new")`` one merged adapter.

        One pass over each weight. Where the merge was exact, so is this: a weight is, bit for bit, what merging
        ``new`` into the original, instead of the old one, gives. ``new`` becomes active in place of what it replaces;
        what is trainable stays as it is. Rank, scaling, dtype and target modules of the two may differ.

        Raises:
            ValueError: nothing is merged, or an adapter is unknown, merged already or (``old``) not merged.
        """
        old, new = (None, adapter_name) if new is None else (adapter_name, new)
        self._known([new] if old is None else [old, new])
        weighted = self._weighted()
        layers = self._merging(weighted)
        merged = [layer for layer in layers if layer.merged]
        if not merged:
            raise ValueError("switch_adapter: no adapter is merged; call merge_adapter() first")
        if any(new in layer.merged_adapters for layer in merged):
            raise ValueError(f"adapter_name: '{new}' is merged already")
        olds = list(dict.fromkeys(n for layer in merged for n in layer.merged_adapters)) if old is None else [old]
        self._known_merged(olds, merged)
        active = [new] if old is None else replaced(self._active, olds, new)
        parts = self._parts()
        for one in parts:
            if not isinstance(one, LoraLayer):
                one.check_set_adapter(active)
        exact = any(layer.residuals for layer in merged if isinstance(layer, LoraLayer))
        for layer in layers:
            if not isinstance(layer, LoraLayer) and new in layer.adapter_names():
                layer.check_disjoint([new], besides=olds)
        part([x for x in layers if new in x.adapter_names() and not x.merged], self.model)

        def switch(layer):
            gone = [n for n in layer.merged_adapters if n in olds]
            if gone and new in layer.adapter_names():
                layer.switch(new) if old is None else layer.switch(old, new)
            elif gone:
                layer.unmerge(gone)
            elif new in layer.adapter_names():
                layer.merge(adapter_names=[new], exact=exact)
            if isinstance(layer, LoraLayer):
                layer._active_adapter = list(active)
                layer._reroute()

        def activate():
            for one in parts:
                one._active_adapter = list(active)
            self._active = active

        self._all_or_none(layers, switch, weighted, finish=activate)

    def _all_or_none(self, layers, action, weighted, progressbar=False, finish=lambda: None, together=None):
        """``action`` on each of ``layers``; what ``together``, a :class:`_Sums`, can do at once it does first.

        ``weighted``: :meth:`_weighted`, of which those that share a weight with others get it back where they can.
        """

        def named(layer):
            try:
                action(layer)
            except ValueError as error:
                raise ValueError(f"'{self._path(layer)}': {error}") from error

        def step(one):
            if not isinstance(one, Together):
                named(one)
            elif not together.add():
                for layer in one.layers:
                    named(layer)

        if together is not None and len(together.work) > 1:
            listed = Together(list(together.work))
            layers = [listed, *[layer for layer in layers if layer not in together.work]]
        if progressbar:
            from tqdm.auto import tqdm

            layers = tqdm(layers, desc="Merging")
        try:
            all_or_none(layers, step, finish)
        finally:
            rejoin(weighted)

    def _weighted(self):
        """The layers whose adapters change a weight: LoRA layers, and those of token rows."""
        parts = [p.token_adapter if isinstance(p, TrainableTokensWrapper) else p for p in self._parts()]
        return [p for p in parts if isinstance(p, (LoraLayer, TrainableTokensLayer))]

    def _merging(self, weighted=None):
        """Of the layers whose adapters change a weight, one for each set of rows that tied layers share."""
        weighted = self._weighted() if weighted is None else weighted
        return [x for x in weighted if isinstance(x, LoraLayer) or x.holder is x]

    def _path(self, layer):
        return next(path for path, module in named_modules(self.model) if module is layer)

    @staticmethod
    def _known_merged(names, layers):
        merged = list(dict.fromkeys(n for layer in layers for n in layer.merged_adapters))
        missing = [n for n in names if n not in merged]
        if missing:
            raise ValueError(f"adapter_names: {missing} not merged; merged: {merged}")
