"""``AdapterPool``: many adapters resident on one model, each row of a batch served by its own.

    pool = AdapterPool(model, num_slots=64, max_rank=64)
    pool.register("sql", "path/to/peft/checkpoint")
    with pool.batch(["sql", None, "chat"]):
        model(input_ids)

An adapter is a name, a slot its place in the banks. Banks are made for a layer when the first adapter that
touches it is registered. (Slots and batched updates: Punica, arXiv:2310.18547; S-LoRA, arXiv:2311.03285.)
"""

import contextlib
import difflib
import math
import os

import torch
from torch import nn

from ..io.source import read_adapter
from ..targeting import pattern_value
from .layer import PooledLinear
from .router import Router

_PREFIX = "base_model.model."


class AdapterPool:
    """Adapters resident on the linear layers of ``model``, which is wrapped in place.

    Args:
        model: any module; its ``nn.Linear`` layers can carry adapters.
        num_slots: adapters that can be resident at once.
        max_rank: largest rank that a slot holds.
        dtype: of the banks; None is each layer's own. float32 keeps float32 adapters unrounded on a
            half-precision base.
    """

    def __init__(self, model, num_slots=64, max_rank=64, *, dtype=None):
        for name, value in (("num_slots", num_slots), ("max_rank", max_rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model, self.num_slots, self.max_rank, self.dtype = model, num_slots, max_rank, dtype
        parameter = next(model.parameters(), None)
        self._router = Router(num_slots, None if parameter is None else parameter.device)
        self._slot_of = {}
        self._layers = {}

    @property
    def names(self):
        """The adapters that are resident, in the order they came."""
        return list(self._slot_of)

    def register(self, name, source, *, config=None, skip_modules_to_save=False):
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
        if name in self._slot_of:
            raise ValueError(f"name: '{name}' is resident already; evict it first")
        free = [slot for slot in range(self.num_slots) if slot not in self._slot_of.values()]
        if not free:
            raise ValueError(f"num_slots: all {self.num_slots} slots are taken by {self.names}; evict one first")
        if isinstance(source, (str, os.PathLike)):
            config, tensors = read_adapter(self.model, source, config)
        else:
            tensors = dict(source)
            if config is None:
                raise ValueError("config: expected the LoraConfig of the state dict, got None")
        adapters = self._parse(config, tensors, skip_modules_to_save)
        try:
            for path, adapter in adapters.items():
                self._layer(path).fill(free[0], *adapter)
        except BaseException:
            self._clear(free[0])
            raise
        self._slot_of[name] = free[0]

    def evict(self, name):
        """Frees the slot of an adapter. ValueError when no adapter has that name."""
        self._clear(self._slot(name))
        del self._slot_of[name]

    @contextlib.contextmanager
    def batch(self, names):
        """Within the block, row i of each batch runs with adapter ``names[i]``; None is the base model.

        As ``torch.no_grad``, of the thread that enters it: several threads can run batches of their own at once.

        Raises:
            ValueError: a name that is not resident.
        """
        if isinstance(names, str):
            raise TypeError(f"names: expected one adapter (or None) a row, got the str {names!r}")
        slots = [-1 if name is None else self._slot(name) for name in names]
        if not slots:
            raise ValueError("names: expected at least one row, got none")
        if self._router.batch_size:
            raise RuntimeError("batch: another batch is running; batches do not nest")
        self._router.start(slots)
        try:
            yield
        finally:
            self._router.stop()

    def remove(self):
        """Takes the pool off: the model has its own layers back, and the adapters are gone."""
        for path, layer in self._layers.items():
            self._replace(path, layer.base_layer)
        self._layers, self._slot_of = {}, {}

    def _slot(self, name):
        if name not in self._slot_of:
            raise ValueError(f"name: no adapter '{name}' is resident{_closest(name, self.names)}")
        return self._slot_of[name]

    def _clear(self, slot):
        for layer in self._layers.values():
            layer.clear(slot)

    def _layer(self, path):
        if path not in self._layers:
            base = self.model.get_submodule(path)
            self._layers[path] = PooledLinear(base, self._router, self.num_slots, self.max_rank, self.dtype)
            self._layers[path].train(base.training)
            self._replace(path, self._layers[path])
        return self._layers[path]

    def _replace(self, path, module):
        parent, _, child = path.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)

    def _parse(self, config, tensors, skip_modules_to_save):
        """{path of a linear layer: (lora_a, lora_b, scaling)}, everything checked."""
        saved = tuple(config.modules_to_save or ())
        if config.target_parameters:
            raise ValueError(f"config: target_parameters={config.target_parameters} is not served by the pool")
        if config.bias != "none":
            raise ValueError(f"config: bias={config.bias!r} trains base biases, which rows can not share")
        if saved and not skip_modules_to_save:
            raise ValueError(
                f"config: modules_to_save={list(saved)} is not served by the pool; pass skip_modules_to_save=True "
                "to load the adapter without them"
            )
        found, other = {}, []
        for key, tensor in tensors.items():
            path, factor = self._place(key)
            if factor is None:
                if not any(part in saved for part in key.split(".")):
                    other.append(key)
                continue
            found.setdefault(path, {})[factor] = tensor
        if other:
            raise ValueError(f"tensors: only LoRA on linear layers is served, got {other[:5]}")
        if not found:
            raise ValueError("tensors: no lora_A and lora_B found")
        return {path: self._checked(config, path, factors) for path, factors in found.items()}

    @staticmethod
    def _place(key):
        for factor in ("lora_A", "lora_B"):
            ending = f".{factor}.weight"
            if key.endswith(ending):
                return key.removeprefix(_PREFIX).removesuffix(ending), factor
        return None, None

    def _checked(self, config, path, factors):
        linears = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, (nn.Linear, PooledLinear)) and not name.endswith(".base_layer")
        }
        if path not in linears:
            raise ValueError(f"tensors: the model has no linear layer '{path}'{_closest(path, linears)}")
        if set(factors) != {"lora_A", "lora_B"}:
            raise ValueError(f"tensors: '{path}' has {sorted(factors)} only, expected lora_A and lora_B")
        lora_a, lora_b = factors["lora_A"], factors["lora_B"]
        in_features, out_features = linears[path].in_features, linears[path].out_features
        rank = lora_a.shape[0]
        if lora_a.dim() != 2 or lora_a.shape[1] != in_features or tuple(lora_b.shape) != (out_features, rank):
            raise ValueError(
                f"tensors: '{path}' expected lora_A (rank, {in_features}) and lora_B ({out_features}, rank), "
                f"got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
            )
        if not 1 <= rank <= self.max_rank:
            raise ValueError(f"max_rank: '{path}' has rank {rank}, a slot holds 1 to {self.max_rank}")
        for factor, tensor in factors.items():
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise ValueError(f"tensors: '{path}' {factor} must be finite floating numbers")
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        return lora_a, lora_b, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _closest(wanted, names):
    near = difflib.get_close_matches(wanted, list(names), n=3, cutoff=0.4)
    return f"; closest: {', '.join(near)}" if near else ""
