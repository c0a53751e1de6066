"""``AdapterPool``: many adapters resident on one model, each row of a batch served by its own.

    pool = AdapterPool(model, num_slots=64, max_rank=64)
    pool.register("sql", "path/to/peft/checkpoint")
    with pool.batch(["sql", None, "chat"]):
        model(input_ids)

An adapter is a name, a slot its place in the banks. Banks are made for a layer when the first adapter that
touches it is registered. Several threads may register, evict and run batches at once: what a batch names stays where
it is until the batch ends. (Slots and batched updates: Punica, arXiv:2310.18547; S-LoRA, arXiv:2311.03285.)
"""

import collections
import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from ..config import LoraConfig
from ..io.source import read_adapter
from ..unfuse import fused_paths, turn_off
from .adapter import closest, parse
from .layer import WIDTHS, PooledLinear
from .router import Router


class AdapterPool:
    """Adapters resident on the linear layers of ``model``, which is wrapped in place.

    Args:
        model: any module; the ``nn.Linear`` layers inside of it can carry adapters. Their inputs have the batch first.
            Where it is flattened into tokens (2-D), each row counts equally many: adapters on a vision tower that
            packs the patches of all images need images of one size.
        num_slots: adapters that can be resident at once.
        max_rank: largest rank that a slot holds.
        dtype: of the banks; None is each layer's own. float32 keeps float32 adapters unrounded on a
            half-precision base.
    """

    def __init__(
        self, model: nn.Module, num_slots: int = 64, max_rank: int = 64, *, dtype: torch.dtype | None = None
    ) -> None:
        for name, value in (("num_slots", num_slots), ("max_rank", max_rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, (nn.Linear, PooledLinear)):
            raise ValueError("model: expected a module that holds linear layers, got such a layer itself")
        if dtype is not None and dtype not in WIDTHS:
            raise ValueError(f"dtype: expected None or one of {', '.join(map(str, WIDTHS))}, got {dtype!r}")
        self.model, self.num_slots, self.max_rank, self.dtype = model, num_slots, max_rank, dtype
        devices = (p.device for p in model.parameters() if p.device.type != "meta")
        self._router = Router(num_slots, [next(devices, torch.device("cpu"))])
        self._slot_of = {}
        self._layers = {}
        self._fused = []
        self._running = collections.Counter()  # {slot: batches that name it}
        self._lock = threading.RLock()

    def __getstate__(self):  # a copy or a pickle has no batch running
        return {**self.__dict__, "_running": collections.Counter(), "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.RLock())

    @property
    def names(self) -> list[str]:
        """The adapters that are resident, in the order they came."""
        return list(self._slot_of)

    def register(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, torch.Tensor],
        *,
        config: LoraConfig | None = None,
        skip_modules_to_save: bool = False,
    ) -> None:
        """Makes an adapter resident.

        Args:
            name: what ``batch`` calls it.
            source: directory of a PEFT checkpoint, or a state dict with PEFT's keys.
            config: :class:`LoraConfig` of a state dict; read from the directory when ``source`` is one.
            skip_modules_to_save: load an adapter that also trained whole modules (a classification head)
                without them; the caller then runs those modules itself.

        Raises:
            ValueError: a name that is taken, no free slot, a rank above ``max_rank``, tensors that do not fit
                the model or are not finite, or a checkpoint with more than LoRA on linear layers. The pool is
                then as it was.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name: expected a non-empty str, got {name!r}")
        with self._lock:
            self._free_slot(name)  # before anything is read
        if isinstance(source, (str, os.PathLike)):
            config, tensors = read_adapter(self.model, source, config)
        else:
            tensors = dict(source)
            if config is None:
                raise ValueError("config: expected the LoraConfig of the state dict, got None")
        with self._lock:
            slot = self._free_slot(name)
            adapters = parse(self, config, tensors, skip_modules_to_save)
            before = set(self._layers)
            try:
                for path, adapter in adapters.items():
                    self._layer(path).fill(slot, *adapter)
                self._unfuse()
            except BaseException:
                self._unwrap(set(self._layers) - before)
                self._clear(slot)
                raise
            self._slot_of[name] = slot

    def evict(self, name: str) -> None:
        """Frees the slot of an adapter.

        Raises:
            ValueError: no adapter has that name.
            RuntimeError: a batch that runs, in any thread, names the adapter.
        """
        with self._lock:
            slot = self._slot(name)
            if self._running[slot]:
                raise RuntimeError(f"name: '{name}' is in a batch that runs; evict it after")
            self._clear(slot)
            del self._slot_of[name]

    @contextlib.contextmanager
    def batch(self, names: Iterable[str | None]) -> Iterator[None]:
        """Within the block, row i of each batch runs with adapter ``names[i]``; None is the base model.

        As ``torch.no_grad``, of the thread that enters it: several threads can run batches of their own at once.

        Raises:
            ValueError: a name that is not resident; within the block, a layer whose input does not have the batch
                first.
        """
        names = _listed(names)
        if self._router.batch_size:
            raise RuntimeError("batch: another batch is running; batches do not nest")
        used = set()
        try:
            with self._lock:
                slots = [-1 if name is None else self._slot(name) for name in names]
                used = set(slots) - {-1}
                self._running.update(used)
            self._router.start(slots)
            yield
        finally:
            self._router.stop()
            with self._lock:
                self._running.subtract(used)

    def remove(self) -> None:
        """Takes the pool off: the model has its own layers back, and the adapters are gone.

        Raises:
            RuntimeError: a batch that names an adapter is running; nothing has changed.
        """
        with self._lock:
            if +self._running:
                raise RuntimeError("remove: a batch is running; remove the pool after")
            self._unwrap(list(self._layers))
            self._slot_of = {}

    def owns(self, path: str, layer: nn.Module) -> bool:
        """Whether this pool has put ``layer`` into the model, at ``path``."""
        return self._layers.get(path) is layer

    def _free_slot(self, name):
        if name in self._slot_of:
            raise ValueError(f"name: '{name}' is resident already; evict it first")
        for slot in range(self.num_slots):
            if slot not in self._slot_of.values():
                return slot
        raise ValueError(f"num_slots: all {self.num_slots} slots are taken by {self.names}; evict one first")

    def _slot(self, name):
        if not isinstance(name, str):
            raise TypeError(f"name: expected the name of an adapter, got {name!r}")
        if name not in self._slot_of:
            raise ValueError(f"name: no adapter '{name}' is resident{closest(name, self.names)}")
        return self._slot_of[name]

    def _clear(self, slot):
        for layer in self._layers.values():
            layer.clear(slot)

    def _layer(self, path):
        if path not in self._layers:
            base = self.model.get_submodule(path)
            layer = PooledLinear(base, self._router, self.num_slots, self.max_rank, self.dtype)
            self._layers[path] = layer.train(base.training)
            self._replace(path, layer)
        return self._layers[path]

    def _unwrap(self, paths):
        """Gives the model its own layers back; not where somebody has put another there since."""
        for path in paths:
            layer = self._layers.pop(path)
            if self.model.get_submodule(path) is layer:
                self._replace(path, layer.base_layer)
        for module, attribute, value in self._fused:
            setattr(module, attribute, value)
        self._fused = []
        self._unfuse()

    def _unfuse(self):
        for fused in fused_paths(self.model.modules(), PooledLinear):
            self._fused.append(fused)
            turn_off(fused)

    def _replace(self, path, module):
        parent, _, child = path.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)


def _listed(names):
    """The names of a batch as a list, checked as far as it goes without a pool."""
    if isinstance(names, (str, Mapping)) or not isinstance(names, Iterable):
        raise TypeError(f"names: expected one adapter (or None) a row, got {names!r}")
    names = list(names)
    if not names:
        raise ValueError("names: expected at least one row, got none")
    return names
