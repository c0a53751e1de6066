"""``LoraEmbedding``: ``y = W[x] + Σ scaling · (Aᵀ)[x] Bᵀ``."""

import torch
from torch import nn
from torch.nn import functional as F

from .base import LoraLayer
from .mixed import Batch, run_lora
from .scaling import scaling_buffer


class LoraEmbedding(LoraLayer):
    """An embedding with LoRA adapters: ``lora_embedding_A`` (r, V) and ``lora_embedding_B`` (d, r).

    ``forward``: indices (…) -> (…, d), as the base layer. LoRA dropout does not apply, as in PEFT.
    """

    base_class = nn.Embedding

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.in_features, self.out_features = base_layer.num_embeddings, base_layer.embedding_dim

    def _make_adapter(self, name, r, init, device, dtype):
        a = torch.randn(r, self.in_features, device=device, dtype=dtype)
        b = torch.randn(self.out_features, r, device=device, dtype=dtype)
        if init:
            nn.init.zeros_(a)
            nn.init.normal_(b)
        self.lora_embedding_A[name], self.lora_embedding_B[name] = nn.Parameter(a), nn.Parameter(b)

    @staticmethod
    def checkpoint_keys(base, name, r):
        """Of an adapter: key in a checkpoint -> (key in this layer, shape)."""
        return {
            "lora_embedding_A": (f"lora_embedding_A.{name}", (r, base.num_embeddings)),
            "lora_embedding_B": (f"lora_embedding_B.{name}", (base.embedding_dim, r)),
        }

    def _factors(self, name):
        # The weight is (V, d): its update is Aᵀ (V, r) times Bᵀ (r, d).
        return self.lora_embedding_B[name].t(), self.lora_embedding_A[name].t()

    def forward(self, x, *args, **kwargs):
        if self._rows.batch is not None or "adapter_names" in kwargs:
            batch = Batch(kwargs.pop("adapter_names")) if "adapter_names" in kwargs else self._rows.batch
            return run_lora(self, batch, x, *args, **kwargs)
        base = self.base_layer
        y = base(x, *args, **kwargs)
        for name, sign in self._terms:
            # max_norm would renormalise the factor in place: it belongs to the base weight alone.
            rows = F.embedding(
                x,
                self.lora_embedding_A[name].t(),
                padding_idx=base.padding_idx,
                scale_grad_by_freq=base.scale_grad_by_freq,
                sparse=base.sparse,
            )
            scale = self._buffers[scaling_buffer(name)] if sign > 0 else -self._merged[name]
            update = F.linear(rows, self.lora_embedding_B[name]) * scale
            if hasattr(base, "embed_scale"):  # some models scale the embedding inside the layer
                update = update * base.embed_scale
            y = (y + update).to(y.dtype)
        return y
