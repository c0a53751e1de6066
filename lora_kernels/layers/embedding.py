"""``LoraEmbedding``: ``y = W[x] + Σ scaling · (Aᵀ)[x] Bᵀ``."""

import torch
from torch import nn
from torch.nn import functional as F

from ..ops.embedding.api import lora_embedding
from ..ops.linear.api import autocast_dtype
from .base import LoraLayer
from .linear import _unhooked


class LoraEmbedding(LoraLayer):
    """An embedding with LoRA adapters: ``lora_embedding_A`` (r, V) and ``lora_embedding_B`` (d, r).

    ``forward``: indices (…) -> (…, d), as the base layer. LoRA dropout does not apply, as in PEFT.
    """

    base_class = nn.Embedding
    _module_kinds = ()
    _parameter_kinds = ("lora_embedding_A", "lora_embedding_B")
    inits = ()  # whatever is asked for starts the same way, as in PEFT
    has_dropout = has_bias = False

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.in_features, self.out_features = base_layer.num_embeddings, base_layer.embedding_dim

    def _check_options(self, init, r, *, lora_dropout, use_dora, lora_bias):
        if lora_bias:
            raise ValueError("lora_bias=True is not supported for Embedding.")
        super()._check_options(bool(init), r, lora_dropout=lora_dropout, use_dora=use_dora, lora_bias=False)

    def _make_adapter(self, name, r, device, dtype, bias):
        a = torch.randn(r, self.in_features, device=device, dtype=dtype)
        b = torch.randn(self.out_features, r, device=device, dtype=dtype)
        self.lora_embedding_A[name], self.lora_embedding_B[name] = nn.Parameter(a), nn.Parameter(b)

    def _start_factors(self, name):
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def _reset(self, name, kind):
        nn.init.zeros_(self.lora_embedding_A[name])
        nn.init.normal_(self.lora_embedding_B[name])

    @staticmethod
    def checkpoint_keys(base, name, r, *, use_dora=False, lora_bias=False):
        """Of an adapter: key in a checkpoint -> (key in this layer, shape)."""
        keys = {
            "lora_embedding_A": (f"lora_embedding_A.{name}", (r, base.num_embeddings)),
            "lora_embedding_B": (f"lora_embedding_B.{name}", (base.embedding_dim, r)),
        }
        if use_dora:
            keys["lora_magnitude_vector"] = (f"lora_magnitude_vector.{name}.weight", (base.embedding_dim,))
        return keys

    def _factors(self, name):
        # The weight is (V, d): its update is Aᵀ (V, r) times Bᵀ (r, d).
        return self.lora_embedding_B[name].t(), self.lora_embedding_A[name].t()

    def _norm_matrix(self):
        return self.weight.detach().t()

    def _norm_factors(self, name):
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def forward(self, x, *args, **kwargs):
        plain = None if args or kwargs or self._rows.batch is not None else self._plain(x)
        if plain is None:
            return super().forward(x, *args, **kwargs)
        return lora_embedding(x, *plain, padding_idx=self.base_layer.padding_idx)

    def _plain(self, x):
        """(weight, A, B, scaling) where one op computes the layer, None where not."""
        base, single = self.base_layer, self._single
        if single is None or base.__class__ is not nn.Embedding or not _unhooked(base):
            return None
        if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
            return None
        name, scale = single
        weight, a, b = base._parameters.get("weight"), self.lora_embedding_A[name], self.lora_embedding_B[name]
        if weight.__class__ is not nn.Parameter or a.dtype not in (weight.dtype, torch.float32) or b.dtype != a.dtype:
            return None
        if weight.requires_grad or x.dtype not in (torch.int32, torch.int64):
            return None
        return None if autocast_dtype(x.device.type) is not None else (weight, a, b, self._buffers[scale])

    def _update(self, name, x):
        base = self.base_layer
        # max_norm would renormalise the factor in place: it belongs to the base weight alone.
        rows = F.embedding(
            x,
            self.lora_embedding_A[name].t(),
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )
        update = F.linear(rows, self.lora_embedding_B[name])
        # Some models scale the embedding inside the layer.
        return update * base.embed_scale if hasattr(base, "embed_scale") else update
