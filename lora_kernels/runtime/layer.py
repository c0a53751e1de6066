"""``PooledLinear``: a base linear layer and the banks of the adapters that touch it."""

import dataclasses

import torch
from torch import nn

from .. import ops
from ..layers.linear import _unhooked

WIDTHS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class PooledLinear(nn.Module):
    """A linear layer whose rows take the adapters of the slots that the pool's current batch names.

    A plain ``nn.Linear`` runs as one op; any other (quantised, a subclass, one with hooks) by its own forward, then
    the update.

    Buffers (not in the state dict): ``a_bank (num_slots, max_rank, in)``, ``b_bank (num_slots, out, max_rank)``,
    ``slot_scalings (num_slots)``, ``slot_ranks (num_slots)``; rank 0 where a slot's adapter leaves the layer alone.
    """

    def __init__(self, base_layer, router, num_slots, max_rank, dtype):
        super().__init__()
        self.base_layer = base_layer
        self._router = router
        in_features, out_features = base_layer.in_features, base_layer.out_features
        self.in_features, self.out_features = in_features, out_features
        device = base_layer.weight.device
        make = {"device": device, "dtype": bank_dtype(base_layer, dtype)}
        with torch.inference_mode(False):  # later calls write into them
            banks = {
                "a_bank": torch.zeros(num_slots, max_rank, in_features, **make),
                "b_bank": torch.zeros(num_slots, out_features, max_rank, **make),
                "slot_scalings": torch.zeros(num_slots, device=device, dtype=torch.float32),
                "slot_ranks": torch.zeros(num_slots, dtype=torch.int32, device=device),
            }
        for name, bank in banks.items():
            self.register_buffer(name, bank, persistent=False)
        router.serve(device)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def fill(self, slot, lora_a, lora_b, scaling):
        """Puts an adapter into a slot; rank is the rows of ``lora_a``."""
        rank = lora_a.shape[0]
        with torch.inference_mode(False), torch.no_grad():
            self.a_bank[slot, :rank] = lora_a
            self.b_bank[slot, :, :rank] = lora_b
            self.slot_scalings[slot] = scaling
            self.slot_ranks[slot] = rank

    def clear(self, slot):
        """Empties a slot: its rank is 0, and its memory holds zeros."""
        with torch.inference_mode(False), torch.no_grad():
            self.slot_ranks[slot] = 0
            for bank in (self.a_bank, self.b_bank, self.slot_scalings):
                bank[slot] = 0

    def forward(self, x):
        plan = self._router.plan(x)
        base = self.base_layer
        if plan is None:
            return base(x)
        plan = dataclasses.replace(plan, slot_ranks=self.slot_ranks)
        if type(base) is nn.Linear and type(base.weight) in (nn.Parameter, torch.Tensor) and _unhooked(base):
            banks = (self.a_bank, self.b_bank, self.slot_scalings)
            return ops.multi_lora_linear(x, base.weight, base.bias, *banks, plan)
        y = base(x)
        rows, inputs = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
            return self._added(rows, inputs, plan).view(y.shape)
        h = ops.lora_shrink(inputs, self.a_bank, plan)
        rows = rows.clone()  # others may hold the output
        return ops.lora_expand_(rows, h, self.b_bank, self.slot_scalings, plan).view(y.shape)

    def _added(self, y, x, plan):
        """y (rows, out) and the updates, differentiable: one product of torch a slot."""
        slots = plan.token_slots[: len(x)]
        for slot in slots.unique().tolist():
            rank = int(self.slot_ranks[slot]) if slot >= 0 else 0
            if rank:
                rows = (slots == slot).nonzero().squeeze(1)
                h = x[rows].to(self.a_bank.dtype) @ self.a_bank[slot, :rank].t()
                update = h @ self.b_bank[slot, :, :rank].t() * self.slot_scalings[slot]
                y = y.index_add(0, rows, update.to(y.dtype))
        return y

    def _apply(self, fn, recurse=True):
        exact = self.slot_scalings
        super()._apply(fn, recurse)
        if self.slot_scalings.dtype is not torch.float32:  # the model was cast
            self.slot_scalings = exact.to(self.slot_scalings.device)
        self._router.serve(self.slot_scalings.device)
        return self


def bank_dtype(layer, dtype):
    """What the banks of a layer hold: ``dtype``; by default as its weight, float32 where that is quantised."""
    own = layer.weight.dtype
    return dtype or (own if own in WIDTHS else torch.float32)
