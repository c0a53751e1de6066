"""Mixed batches: each sample of a batch names its adapter (``adapter_names``), "__base__" for none.

One :class:`Rows` is shared by all layers of a model. While it holds a :class:`Batch`, every layer runs that batch;
plans of rows are built once a batch and shape, and used by all layers. No layer is walked or hooked for a call.
"""

import contextlib
import threading

import torch
from torch import nn

from .. import ops
from ..ops.wide import wide_dtype

BASE = "__base__"
_SAVED_KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Rows(threading.local):
    """What the layers of a model share: the batch that is running, or None; each thread has its own."""

    def __init__(self):
        self.batch = None

    def __reduce__(self):  # a copy or a pickle of a model has no batch running
        return Rows, ()

    @contextlib.contextmanager
    def hold(self, batch):
        """The layers run ``batch`` in this context."""
        before, self.batch = self.batch, batch
        try:
            yield
        finally:
            self.batch = before


class Batch:
    """The adapter of each sample, and the plans made of it so far.

    Args:
        names: one adapter name a sample.
        copies: how often each sample is repeated where a beam search has repeated the inputs; the encoder of a
            model still sees each once.
    """

    def __init__(self, names, copies=1):
        self.names = {len(names): list(names)}
        self.names.setdefault(len(names) * copies, [name for name in names for _ in range(copies)])
        self.given = len(names) * copies
        self.order = [name for name in dict.fromkeys(names) if name != BASE]
        self._plans, self._scalings, self._groups = {}, {}, {}

    def of(self, x):
        """The names of the samples of ``x``. ValueError when there are not as many."""
        found = self.names.get(len(x))
        if found is None:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{self.given} and {len(x)} respectively."
            )
        return found

    def present(self, known):
        """The adapters of the batch that a layer, whose adapters are ``known``, has."""
        return tuple([name for name in self.order if name in known])

    def plan(self, x, present):
        """The :class:`BatchPlan` of the rows of ``x`` (samples, …, features) over the adapters ``present``."""
        rows = x.shape[1:-1].numel()
        key = (len(x), rows, present, x.device)
        if key not in self._plans:
            slots = {name: slot for slot, name in enumerate(present)}
            samples = torch.tensor([slots.get(name, -1) for name in self.of(x)], dtype=torch.int32)
            rows = samples.repeat_interleave(rows) if rows != 1 else samples
            self._plans[key] = ops.plan_batch(rows.to(x.device), num_slots=len(present))
        return self._plans[key]

    def scalings(self, values, weight):
        """A float32 tensor (float64 beside a float64 weight) of them; layers mostly have the same."""
        key = (values, weight.device, weight.dtype is torch.float64)
        if key not in self._scalings:
            self._scalings[key] = torch.tensor(values, dtype=wide_dtype(weight), device=weight.device)
        return self._scalings[key]

    def groups(self, x):
        """``[(name, indices of its samples)], inverse``: ``cat(groups)[inverse]`` is in the order of the batch."""
        key = (len(x), x.device)
        if key not in self._groups:
            names = self.of(x)
            found = {name: [i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
            order = torch.tensor([i for indices in found.values() for i in indices], dtype=torch.long)
            parts = [(n, torch.tensor(i, dtype=torch.long, device=x.device)) for n, i in found.items()]
            self._groups[key] = parts, order.argsort().to(x.device)
        return self._groups[key]


def run_lora(layer, batch, x, *args, **kwargs):
    """The forward of a LoRA layer for a mixed batch. ValueError: DoRA, merged adapters, a wrong number of names."""
    if layer._disable_adapters:
        return layer.base_layer(x, *args, **kwargs)
    batch.of(x)
    if layer._merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    dora = layer.use_dora
    if any(dora.get(name) for name in batch.order):
        raise ValueError("Cannot pass `adapter_names` when DoRA is enabled.")
    return layer._forward_rows(batch, x, *args, **kwargs)


def by_group(layer, batch, x, *args, **kwargs):
    """Any kind of layer: each adapter's samples through the layer's own forward."""
    groups, inverse = batch.groups(x)
    parts = []
    for name, indices in groups:
        one = _with_one_active(layer, [] if name == BASE else [name])
        parts.append(type(one).forward(one, x[indices], *args, **kwargs))
    return torch.cat(parts)[inverse]


def _with_one_active(layer, names):
    """The layer as it is with these adapters active: another object on the same modules, as the layer itself may be
    running in another thread."""
    one = type(layer).__new__(type(layer))
    one.__dict__.update(layer.__dict__, _active_adapter=names, _rows=Rows(), _group=None)
    one._reroute()
    return one


def run_saved(wrapper, batch, x, *args, **kwargs):
    """The forward of a module that adapters save in full: each sample through the copy of its adapter."""
    if not isinstance(wrapper.original_module, _SAVED_KINDS):
        kinds = ", ".join(kind.__name__ for kind in _SAVED_KINDS)
        raise TypeError(f"Mixed batching is only supported for the following modules: {kinds}.")
    groups, inverse = batch.groups(x)
    copies = wrapper.modules_to_save
    parts = []
    for name, indices in groups:
        module = copies[name] if name in copies else wrapper.original_module  # noqa: SIM401, a ModuleDict has no get
        parts.append(module(x[indices], *args, **kwargs))
    return torch.cat(parts)[inverse]
