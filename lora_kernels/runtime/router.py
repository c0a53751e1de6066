"""``Router``: which slot each row of the current batch takes, shared by all layers of a pool."""

import threading

import torch

from .. import ops


class Router(threading.local):
    """Slots of the batch rows, and the plans made from them, one for each number of tokens; each thread has its own.

    The rows of a batch may be sequences: a layer's input of ``batch × T`` rows takes each slot T times over.
    Layers read only static tensors, so a compiled model follows the next batch without recompiling. They are plain
    ones whatever mode the caller is in, as a later batch writes into them.
    """

    def __init__(self, num_slots, devices):
        self.num_slots = num_slots
        self.devices = devices  # of the layers; one list for all threads
        self.batch_size = 0
        self._slots = {}  # {(batch size, device): slots}
        self._plans = {}  # {(shape without features, device): plan} of the batch that runs

    def __reduce__(self):  # a copy or a pickle of a model has no batch running
        return Router, (self.num_slots, list(self.devices))

    def serve(self, device):
        """Batches have their slots on ``device``, too, from now on."""
        if device.type != "meta" and device not in self.devices:
            self.devices.append(device)

    def start(self, slots):
        """Routes the rows of the next batches to ``slots``."""
        values = torch.tensor(slots, dtype=torch.int32)
        with torch.inference_mode(False), torch.no_grad():
            for device in self.devices:
                held = self._slots.get((len(slots), device))
                if held is None:
                    self._slots[len(slots), device] = values.to(device, copy=True)
                else:
                    held.copy_(values)
        self._plans.clear()
        self.batch_size = len(slots)

    def stop(self):
        """Back to the base model."""
        self._plans.clear()
        self.batch_size = 0

    def plan(self, x):
        """The plan for the rows of ``x``; None outside a batch.

        Raises:
            ValueError: ``x`` does not have the batch first or may not have it, or rows that are no multiple of it.
        """
        if self.batch_size == 0:
            return None
        if torch.compiler.is_compiling():
            return self._make(x)
        key = x.shape[:-1], x.device
        if key not in self._plans:
            with torch.inference_mode(False), torch.no_grad():
                self._plans[key] = self._make(x)
        return self._plans[key]

    def _make(self, x):
        num_tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
        if num_tokens % self.batch_size:
            raise ValueError(
                f"x: {num_tokens} rows can not be split over the {self.batch_size} rows that pool.batch names"
            )
        if x.dim() > 2 and x.shape[0] % self.batch_size and num_tokens != self.batch_size:
            raise ValueError(
                f"x: expected the {self.batch_size} rows that pool.batch names as its first dimension, got shape "
                f"{tuple(x.shape)}; a layer whose input has no batch, or not first, can not be served"
            )
        if x.dim() == 3 and 1 < self.batch_size == x.shape[1] != x.shape[0] and num_tokens != self.batch_size:
            raise ValueError(
                f"x: shape {tuple(x.shape)} can be a sequence first, then the {self.batch_size} rows that pool.batch "
                f"names, or {x.shape[0]} rows of {self.batch_size} tokens; where the rows are first, name the adapter "
                f"of each of the {x.shape[0]}"
            )
        slots = self._slots.get((self.batch_size, x.device))
        if slots is None:  # the model was moved under the batch
            slots = self._slots[self.batch_size, self.devices[0]].to(x.device)
        tokens = slots.view(-1, 1).expand(-1, num_tokens // self.batch_size).reshape(num_tokens)
        return ops.plan_batch(tokens, num_slots=self.num_slots)
