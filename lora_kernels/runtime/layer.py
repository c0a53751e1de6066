"""``PooledLinear``: a base linear layer and the banks of the adapters that touch it."""

import dataclasses

import torch
from torch import nn

from .. import ops


class PooledLinear(nn.Module):
    """A linear layer whose rows take the adapters of the slots that the pool's current batch names.

    A plain ``nn.Linear`` runs as one op; any other (quantised, a subclass) by its own forward, then the update.

    Buffers (not in the state dict): ``a_bank (num_slots, max_rank, in)``, ``b_bank (num_slots, out, max_rank)``,
    ``slot_scalings (num_slots)``, ``slot_ranks (num_slots)``; rank 0 where a slot's adapter leaves the layer alone.
    """

    def __init__(self, base_layer, router, num_slots, max_rank, dtype):
        super().__init__()
        self.base_layer = base_layer
        self._router = router
        in_features, out_features = base_layer.in_features, base_layer.out_features
        self.in_features, self.out_features = in_features, out_features
        weight = base_layer.weight
        half = weight.dtype in (torch.float16, torch.bfloat16)
        make = {"device": weight.device, "dtype": dtype or (weight.dtype if half else torch.float32)}
        banks = {
            "a_bank": torch.zeros(num_slots, max_rank, in_features, **make),
            "b_bank": torch.zeros(num_slots, out_features, max_rank, **make),
            "slot_scalings": torch.zeros(num_slots, device=weight.device),
            "slot_ranks": torch.zeros(num_slots, dtype=torch.int32, device=weight.device),
        }
        for name, bank in banks.items():
            self.register_buffer(name, bank, persistent=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def fill(self, slot, lora_a, lora_b, scaling):
        """Puts an adapter into a slot; rank is the rows of ``lora_a``."""
        rank = lora_a.shape[0]
        self.a_bank[slot, :rank] = lora_a
        self.b_bank[slot, :, :rank] = lora_b
        self.slot_scalings[slot] = scaling
        self.slot_ranks[slot] = rank

    def clear(self, slot):
        """Empties a slot: its rank is 0, and its memory holds zeros."""
        self.slot_ranks[slot] = 0
        for bank in (self.a_bank, self.b_bank, self.slot_scalings):
            bank[slot] = 0

    def forward(self, x):
        plan = self._router.plan(x)
        if plan is None:
            return self.base_layer(x)
        plan = dataclasses.replace(plan, slot_ranks=self.slot_ranks)
        base = self.base_layer
        if type(base) is nn.Linear and type(base.weight) in (nn.Parameter, torch.Tensor):
            banks = (self.a_bank, self.b_bank, self.slot_scalings)
            return ops.multi_lora_linear(x, base.weight, base.bias, *banks, plan)
        y = base(x)
        rows = y.reshape(-1, y.shape[-1])
        h = ops.lora_shrink(x.reshape(-1, x.shape[-1]), self.a_bank, plan)
        return ops.lora_expand_(rows, h, self.b_bank, self.slot_scalings, plan).view(y.shape)
