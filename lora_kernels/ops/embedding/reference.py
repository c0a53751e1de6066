"""``lora_embedding`` in plain torch.

y = W[ids] + s · h Bᵀ,   h = Aᵀ[ids]
dB = s · dYᵀ h,   dA[:, v] = Σ s · dY[m] B over the rows m with ids[m] = v
"""

import torch
import torch.nn.functional as F

from ..linear.reference import by_rows
from ..wide import wide


def lora_embedding(ids, weight, lora_a, lora_b, scaling, batch_invariant):
    with torch.no_grad():
        h = F.embedding(ids, lora_a.t())
        update = by_rows(lambda rows: F.linear(rows, lora_b), h, batch_invariant)
        return (F.embedding(ids, weight) + update * scaling).to(weight.dtype)


def lora_embedding_backward(dy, ids, lora_a, lora_b, scaling, padding_idx, need_a, need_b):
    with torch.no_grad():
        da, db = lora_a.new_empty(lora_a.shape if need_a else (0,)), lora_b.new_empty(lora_b.shape if need_b else (0,))
        scaled = wide(dy) * scaling
        if need_b:
            db.copy_(scaled.t() @ F.embedding(ids, lora_a.t()).to(scaled.dtype))
        if need_a:
            g = scaled @ lora_b.to(scaled.dtype)
            if padding_idx >= 0:
                g = g.masked_fill((ids == padding_idx)[:, None], 0.0)
            # index_put_ adds in the order of the rows on every device; index_add_ does not.
            sums = torch.zeros((lora_a.shape[1], lora_a.shape[0]), dtype=scaled.dtype, device=dy.device)
            da.copy_(sums.index_put_((ids,), g, accumulate=True).t())
        return da, db


KERNELS = {"lora_embedding": lora_embedding, "lora_embedding_backward": lora_embedding_backward}
