"""``Router``: which slot each row of the current batch takes, shared by all layers of a pool."""

import threading

import torch

from .. import ops


class Router(threading.local):
    """Slots of the batch rows, and the plans made from them, one for each number of tokens; each thread has its own.

    The rows of a batch may be sequences: a layer's input of ``batch × T`` rows takes each slot T times over.
    Layers read only static tensors, so a compiled model follows the next batch without recompiling.
    """

    def __init__(self, num_slots, device):
        self.num_slots = num_slots
        self.device = device
        self.batch_size = 0
        self._slots = {}
        self._plans = {}

    def __reduce__(self):  # a copy or a pickle of a model has no batch running
        return Router, (self.num_slots, self.device)

    def start(self, slots):
        """Routes the rows of the next batches to ``slots``."""
        self._plans.clear()
        self.batch_size = len(slots)
        values = torch.tensor(slots, dtype=torch.int32, device=self.device)
        if self.batch_size in self._slots:
            self._slots[self.batch_size].copy_(values)
        else:
            self._slots[self.batch_size] = values

    def stop(self):
        """Back to the base model."""
        self._plans.clear()
        self.batch_size = 0

    def plan(self, x):
        """The plan for the rows of ``x``; None outside a batch.

        Raises:
            ValueError: the rows of ``x`` are no multiple of the batch.
        """
        if self.batch_size == 0:
            return None
        num_tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
        if torch.compiler.is_compiling():
            return self._make(num_tokens)
        if num_tokens not in self._plans:
            self._plans[num_tokens] = self._make(num_tokens)
        return self._plans[num_tokens]

    def _make(self, num_tokens):
        if num_tokens % self.batch_size:
            raise ValueError(
                f"x: {num_tokens} rows can not be split over the {self.batch_size} rows that pool.batch names"
            )
        slots = self._slots[self.batch_size]
        repeats = num_tokens // self.batch_size
        tokens = slots.view(-1, 1).expand(-1, repeats).reshape(num_tokens)
        return ops.plan_batch(tokens, num_slots=self.num_slots)
