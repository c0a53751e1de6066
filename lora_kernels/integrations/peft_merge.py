"""PEFT's ``merge`` and ``unmerge`` in one pass over the weight, for layers and for whole models.

What a layer's weight and factors look like to ``merge_`` is said by the layer (``_update``); whatever is not plain
LoRA into a plain parameter is PEFT's.
"""

import contextlib
from functools import partial

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel as PeftLoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .. import ops
from .peft_terms import DTYPES


class Merging:
    """``merge`` and ``unmerge`` of a layer whose ``_update(name)`` gives ``(weight, lora_a, lora_b)``, or None."""

    def merge(self, safe_merge=False, adapter_names=None):
        """As PEFT's: ``adapter_names`` (default: the active ones) into the base weight.

        Raises:
            ValueError: ``safe_merge``, and an adapter would leave Inf or NaN; it is not merged.
        """
        named = self.active_adapters if adapter_names is None else adapter_names
        updates = {} if isinstance(named, str) else self._updates(named)
        if not updates:
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        for name in check_adapters_to_merge(self, adapter_names):
            if name in updates:
                try:
                    ops.merge_(*updates[name], self.scaling[name], safe=safe_merge)
                except ValueError as error:
                    message = f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                    raise ValueError(message) from error
                self.merged_adapters.append(name)
        return None

    def unmerge(self):
        """As PEFT's: takes all that is merged out of the base weight again."""
        updates = self._updates(self.merged_adapters)
        if not updates:
            return super().unmerge()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in updates:
                ops.unmerge_(*updates[name], self.scaling[name])
        return None

    def _updates(self, names):
        """Adapter -> ``(weight, lora_a, lora_b)``; empty where one of them is not ours to merge."""
        weight = self.get_base_layer()._parameters.get("weight")
        if weight.__class__ is not nn.Parameter or weight.dtype not in DTYPES or weight.is_meta:
            return {}
        if weight.layout is not torch.strided or weight.is_inference():
            return {}
        updates = {}
        for name in names:
            if name not in self.r:
                continue
            update = None if name in self.lora_variant else self._update(name, weight.detach())
            if update is None or any(t.dtype not in (weight.dtype, torch.float32) for t in update[1:]):
                return {}
            if update[1].device != weight.device or isinstance(self.scaling[name], torch.Tensor):
                return {}
            updates[name] = update
        return updates


class LoraModel(PeftLoraModel):
    """``peft.tuners.lora.LoraModel`` that merges, and routes mixed batches, without touching every module twice."""

    def merge_adapter(self, adapter_names=None, safe_merge=False):
        """As PEFT's."""
        if _offloaded(self.model):
            return super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        self._check_merge_allowed()
        one_by_one = safe_merge or isinstance(adapter_names, str)
        work = {} if one_by_one else self._sums(lambda x: x.active_adapters if adapter_names is None else adapter_names)
        for layer, updates in work.items() if _in_one_call(ops.merge_list_, work) else ():
            layer.merged_adapters.extend(updates)
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) and not (module in work and module.merged_adapters):
                module.merge(adapter_names=adapter_names, safe_merge=safe_merge)
        return None

    def unmerge_adapter(self):
        """As PEFT's."""
        if _offloaded(self.model):
            return super().unmerge_adapter()
        work = self._sums(lambda layer: layer.merged_adapters, merged=True)
        for layer in work if _in_one_call(ops.unmerge_list_, work) else ():
            layer.merged_adapters.clear()
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) and (module not in work or module.merged_adapters):
                module.unmerge()
        return None

    def _sums(self, names_of, merged=False):
        """Layer -> ``{name: (weight, lora_a, lora_b)}`` where one call can merge, or unmerge, all that is to be.

        All of it is ours, and nothing else is merged: there is nothing to warn of or to refuse.
        """
        work = {}
        for layer in self.model.modules():
            if isinstance(layer, Merging) and bool(layer.merged_adapters) is merged:
                updates = layer._updates([n for n in names_of(layer) if n in layer.r])
                if updates:
                    work[layer] = updates
        return work

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """As PEFT's, for ``adapter_names``: layers that are ours are told so without a hook."""
        names = kwargs.get("adapter_names")
        beams = kwargs.get("num_beams")
        if names is None or kwargs.get("alora_offsets") is not None or (isinstance(beams, int) and beams > 1):
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        told, hooked = [], []
        unknown = set(names) - {"__base__"}
        for module in self.modules():
            if isinstance(module, LoraLayer):
                unknown = unknown and unknown.difference(module.lora_A, module.lora_embedding_A)
                (told if isinstance(module, Rows) else hooked).append(module)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                hooked.append(module)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        handles = []
        try:
            for module in told:
                module._row_adapters = names
            hook = partial(_name_rows, adapter_names=names)
            handles += [module.register_forward_pre_hook(hook, with_kwargs=True) for module in hooked]
            yield
        finally:
            for module in told:
                module.__dict__.pop("_row_adapters", None)
            for handle in handles:
                handle.remove()


class Rows:
    """A layer that takes one adapter a row from ``_row_adapters``, which its model sets for the time of a call."""

    _row_adapters = None


def _in_one_call(op, work):
    """Whether ``merge_list_`` or ``unmerge_list_`` has taken all of ``work``; else it has written nothing."""
    updates = [(update, layer.scaling[name]) for layer, found in work.items() for name, update in found.items()]
    try:
        op([weight for (weight, _, _), _ in updates], [(a, b, scale) for (_, a, b), scale in updates])
    except (TypeError, ValueError):
        return False
    return True


def _name_rows(module, args, kwargs, adapter_names):
    return args, {**kwargs, "adapter_names": adapter_names}


def _offloaded(model):
    """Whether accelerate's hooks hold weights elsewhere: PEFT brings them in, a layer at a time."""
    return any("_hf_hook" in module.__dict__ for module in model.modules())
