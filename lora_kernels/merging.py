"""``ModelMerging``: merge, unmerge and switch over all layers of a model, or over none of them."""

import warnings

from .layers import LoraLayer


class ModelMerging:
    """The part of ``LoraModel`` that writes to weights."""

    def merge_adapter(self, adapter_names=None, safe_merge=False, progressbar=False):
        """Adds the updates of adapters (default: the active ones that are not merged) to the weights, in place.

        After any error or interrupt, what had been merged is taken out again.

        Raises:
            ValueError: an adapter that is unknown or merged already, a weight that is tied, or, with ``safe_merge``,
                weights that would not be finite (then nothing was written at all).
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names: expected a list of str, got {adapter_names!r}")
        layers = self.layers()
        merged = {n for layer in layers for n in layer.merged_adapters}
        names = [n for n in self._active if n not in merged] if adapter_names is None else list(adapter_names)
        self._known(names)
        taken = sorted(merged.intersection(self._active if adapter_names is None else names))
        if taken and not (adapter_names is None and names):
            raise ValueError(f"adapter_names: {taken} merged already; unmerge first")
        work = {layer: layer.names_to_merge([n for n in names if n in layer.r]) for layer in layers}
        work = {layer: found for layer, found in work.items() if found}
        self._check_unshared(work)
        if safe_merge:
            paths = {module: path for path, module in self.model.named_modules()}
            for layer, found in work.items():
                if not layer.merge_is_finite(found):
                    raise ValueError(f"safe_merge: merging {found} would leave Inf or NaN in '{paths[layer]}'")
        self._all_or_none(list(work), lambda layer: layer.merge(adapter_names=work[layer]), progressbar)

    def unmerge_adapter(self):
        """Takes all merged updates out of the weights again."""
        layers = [layer for layer in self.layers() if layer.merged]
        if not layers:
            warnings.warn("unmerge_adapter: no adapter is merged", stacklevel=3)
        self._all_or_none(layers, lambda layer: layer.unmerge())

    def switch_adapter(self, adapter_name):
        """Replaces what is merged by ``adapter_name``, in one pass over each weight, and makes it active.

        What is trainable stays as it is. ValueError when nothing is merged, or the adapter is unknown or merged.
        """
        self._known([adapter_name])
        layers = self.layers()
        if not any(layer.merged for layer in layers):
            raise ValueError("switch_adapter: no adapter is merged; call merge_adapter() first")
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise ValueError(f"adapter_name: '{adapter_name}' is merged already")
        self._check_unshared([layer for layer in layers if layer.merged or adapter_name in layer.r])

        def switch(layer):
            if layer.merged and adapter_name in layer.r:
                layer.switch(adapter_name)
            elif layer.merged:
                layer.unmerge()
            elif adapter_name in layer.r:
                layer.merge(adapter_names=[adapter_name])

        self._all_or_none(layers, switch)
        for part in self._parts():
            part._active_adapter = [adapter_name]
            if isinstance(part, LoraLayer):
                part._reroute()
        self._active = [adapter_name]

    @staticmethod
    def _all_or_none(layers, action, progressbar=False):
        before = [(layer, layer.merge_state()) for layer in layers]
        if progressbar:
            from tqdm.auto import tqdm

            layers = tqdm(layers, desc="Merging")
        try:
            for layer in layers:
                action(layer)
        except BaseException:
            for layer, state in before:
                layer.restore_merged(state)
            raise

    def _check_unshared(self, layers):
        """A weight that two modules use (tied embeddings) can not take the update of one of them."""
        users = {}
        for path, module in self.model.named_modules():
            for parameter in module._parameters.values():
                users.setdefault(id(parameter), []).append(path.removesuffix(".base_layer"))
        for layer in layers:
            names = users[id(layer.weight)]
            if len(names) > 1:
                raise ValueError(
                    f"modules {names} share one weight: merging would change all of them; give each its own first"
                )
