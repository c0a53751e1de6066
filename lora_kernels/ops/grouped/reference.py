"""``grouped_lora_linear`` in plain torch: projections that share their input.

    h = X [A₁; A₂; …]ᵀ,   Yᵢ = X Wᵢᵀ + biasᵢ + sᵢ · hᵢ Bᵢᵀ
    dX = Σ (dYᵢ Wᵢ + dhᵢ Aᵢ),   dhᵢ = sᵢ · dYᵢ Bᵢ,   dAᵢ = dhᵢᵀ X,   dBᵢ = sᵢ · dYᵢᵀ hᵢ

dX is summed in float32 and rounded once. Signatures are the ops' own (``ops/library.py``).
"""

import itertools

import torch
import torch.nn.functional as F

from ..linear.reference import _blocks, _mm, _part, expand_, shrink
from ..wide import wide, wide_dtype


def columns_of_h(lora_a):
    """The columns of h that belong to each projection."""
    ends = list(itertools.accumulate(a.shape[0] for a in lora_a))
    return [slice(end - a.shape[0], end) for a, end in zip(lora_a, ends, strict=True)]


def grouped_lora_linear(x, weights, biases, lora_a, lora_b, scalings, y, need_h, batch_invariant):
    with torch.no_grad():
        stacked, columns, no_mask = torch.cat(lora_a), columns_of_h(lora_a), x.new_empty(0, dtype=torch.uint8)
        h = torch.empty((x.shape[0], stacked.shape[0]), dtype=wide_dtype(x), device=x.device)
        step = 1 if batch_invariant else max(1, x.shape[0])
        for row in range(0, x.shape[0], step):
            rows = slice(row, row + step)
            block = _part(x, rows, batch_invariant)
            h[rows] = shrink(block, stacked, no_mask, 0.0)
            for i, out in enumerate(y):
                out[rows] = F.linear(block, weights[i], biases[i] if biases else None)
                expand_(out[rows], h[rows, columns[i]], lora_a[i], lora_b[i], scalings[i], None)
        return h if need_h else h.new_empty(0)


def grouped_lora_backward(x, dy, weights, lora_a, lora_b, scalings, h, da, db, need_x, batch_invariant):
    with torch.no_grad():
        dx = x.new_empty(x.shape if need_x else (0,))
        sums_a = [torch.zeros(a.shape, dtype=h.dtype, device=x.device) for a in da]
        sums_b = [torch.zeros(b.shape, dtype=h.dtype, device=x.device) for b in db]
        columns = columns_of_h(lora_a)
        for rows in _blocks(x.shape[0], batch_invariant):
            total = 0.0
            for i, (grad, s) in enumerate(zip(dy, scalings, strict=True)):
                grad = _part(grad, rows, batch_invariant)
                dh = _mm(grad, lora_b[i]) * s
                if need_x:
                    total = total + (_mm(grad, weights[i]) + dh @ lora_a[i].to(dh.dtype))
                if da:
                    sums_a[i] += dh.t() @ wide(x[rows])
                if db:
                    sums_b[i] += s * (wide(grad).t() @ h[rows, columns[i]])
            if need_x:
                dx[rows] = total.to(dx.dtype)
        for targets, sums in ((da, sums_a), (db, sums_b)):
            for target, value in zip(targets, sums, strict=True):
                target.copy_(value)
        return dx


KERNELS = {"grouped_lora_linear": grouped_lora_linear, "grouped_lora_backward": grouped_lora_backward}
