"""``lora_linear`` and ``lora_add_`` in plain torch: the readable statement, and the fallback that always works.

    Y = X Wᵀ + bias + s · h Bᵀ,   h = dropout(X) Aᵀ
    dX = dY W + s · (dh A) ⊙ keep,   dh = dY B,   dA = s · dhᵀ dropout(X),   dB = s · dYᵀ h

Each function has the signature of its op (see ``ops/library.py``). ``h`` is handed on in float32; products of
two tensors of one dtype run in that dtype, and where the adapter is float32 and ``x`` is not, ``x`` is cast a
block of rows at a time. Where ``x`` is float64 all of it is.
"""

import torch
import torch.nn.functional as F

from ..wide import wide, wide_dtype
from .dropout import dropout_mask, unpack_mask

_ROWS = 4096


def _blocks(num_rows):
    return [slice(i, min(i + _ROWS, num_rows)) for i in range(0, num_rows, _ROWS)]


def _mm(left, right):
    """``left @ right`` in float32 where the dtypes differ, in their own dtype otherwise; float32 (float64) result."""
    if left.dtype == right.dtype:
        return wide(left @ right)
    dtype = wide_dtype(left, right)
    return left.to(dtype) @ right.to(dtype)


def _kept(x, mask):
    """``x`` with the elements of a zero mask bit removed; the scale 1 / (1 - p) is applied in float32 later."""
    return x if mask.numel() == 0 else x * unpack_mask(mask, x.shape[1]).to(x.dtype)


def _slices(lora_a, num_columns, out_splits):
    """(A of the slice, its columns of h, its columns of y) for each slice of a stacked projection."""
    if out_splits is None:
        return [(lora_a, slice(None), slice(0, num_columns))]
    rank, start, result = lora_a.shape[1], 0, []
    for index, width in enumerate(out_splits):
        result.append((lora_a[index], slice(index * rank, (index + 1) * rank), slice(start, start + width)))
        start += width
    return result


def shrink(x, lora_a, mask, dropout_p):
    """h = dropout(X) Aᵀ over all slices; float32, or float64 of float64; (M, S·R)."""
    a = lora_a.flatten(0, -2)
    h = torch.empty(x.shape[0], a.shape[0], dtype=wide_dtype(x), device=x.device)
    for rows in _blocks(x.shape[0]):
        h[rows] = _mm(_kept(x[rows], mask[rows] if mask.numel() else mask), a.t())
    return h.div_(1.0 - dropout_p)


def expand_(y, h, lora_a, lora_b, scaling, out_splits):
    """y += s · h Bᵀ, each slice into its columns, rounded once more."""
    for _, ranks, columns in _slices(lora_a, y.shape[1], out_splits):
        b = lora_b[columns]
        for rows in _blocks(y.shape[0]):
            update = (h[rows, ranks] * scaling) @ b.t().to(h.dtype)
            y[rows, columns] = (wide(y[rows, columns]) + update).to(y.dtype)


def _no_mask(x):
    return torch.empty(0, dtype=torch.uint8, device=x.device)


def _draw(x, dropout_p, dropout_seed):
    return dropout_mask(dropout_seed, x.shape[0], x.shape[1], dropout_p) if dropout_p else _no_mask(x)


def lora_linear_out(out, x, weight, bias, lora_a, lora_b, scaling, out_splits, batch_invariant):
    with torch.no_grad():
        if batch_invariant:
            # One row at a time: no GEMM library promises the same bits for another number of rows.
            for row in range(x.shape[0]):
                out[row : row + 1] = F.linear(x[row : row + 1], weight, bias)
                h = shrink(x[row : row + 1], lora_a, _no_mask(x), 0.0)
                expand_(out[row : row + 1], h, lora_a, lora_b, scaling, out_splits)
            return
        out.copy_(F.linear(x, weight, bias))
        expand_(out, shrink(x, lora_a, _no_mask(x), 0.0), lora_a, lora_b, scaling, out_splits)


def lora_linear(x, weight, bias, lora_a, lora_b, scaling, out_splits, batch_invariant):
    out = x.new_empty((x.shape[0], weight.shape[0]))
    lora_linear_out(out, x, weight, bias, lora_a, lora_b, scaling, out_splits, batch_invariant)
    return out


def lora_linear_train(x, weight, bias, lora_a, lora_b, scaling, dropout_p, dropout_seed, out_splits, batch_invariant):
    with torch.no_grad():
        mask = _draw(x, dropout_p, dropout_seed)
        h = shrink(x, lora_a, mask, dropout_p)
        y = F.linear(x, weight, bias)
        expand_(y, h, lora_a, lora_b, scaling, out_splits)
        return y, h, mask


def lora_linear_backward(
    dy,
    x,
    weight,
    lora_a,
    lora_b,
    scaling,
    h,
    mask,
    dropout_p,
    out_splits,
    need_x,
    need_a,
    need_b,
    batch_invariant,
):
    with torch.no_grad():
        dx = x.new_empty(0)
        da, db = lora_a.new_empty(0), lora_b.new_empty(0)
        if need_x:
            dx = x.new_zeros(x.shape) if weight is None else (dy @ weight).to(x.dtype)
        if need_a:
            da = torch.zeros(lora_a.shape, dtype=h.dtype, device=x.device)
        if need_b:
            db = torch.zeros(lora_b.shape, dtype=h.dtype, device=x.device)
        for index, (a, ranks, columns) in enumerate(_slices(lora_a, lora_b.shape[0], out_splits)):
            b = lora_b[columns]
            for rows in _blocks(x.shape[0]):
                block_dy, block_mask = dy[rows, columns], mask[rows] if mask.numel() else mask
                dh = _mm(block_dy, b) * (scaling / (1.0 - dropout_p))
                if need_x:
                    low_rank = _kept(dh @ a.to(dh.dtype), block_mask)
                    dx[rows] = (wide(dx[rows]) + low_rank).to(dx.dtype)
                if need_a:
                    target = da if out_splits is None else da[index]
                    target += dh.t() @ _kept(wide(x[rows]), block_mask)
                if need_b:
                    db[columns] += scaling * (wide(block_dy).t() @ h[rows, ranks])
        return dx, da.to(lora_a.dtype), db.to(lora_b.dtype)


def lora_add_(y, x, lora_a, lora_b, scaling, batch_invariant):
    with torch.no_grad():
        step = 1 if batch_invariant else max(1, y.shape[0])
        for row in range(0, y.shape[0], step):
            rows = slice(row, row + step)
            expand_(y[rows], shrink(x[rows], lora_a, _no_mask(x), 0.0), lora_a, lora_b, scaling, None)


def lora_add_train_(y, x, lora_a, lora_b, scaling, dropout_p, dropout_seed, batch_invariant):
    with torch.no_grad():
        mask = _draw(x, dropout_p, dropout_seed)
        h = shrink(x, lora_a, mask, dropout_p)
        expand_(y, h, lora_a, lora_b, scaling, None)
        return h, mask


KERNELS = {
    "lora_linear": lora_linear,
    "lora_linear_out": lora_linear_out,
    "lora_linear_train": lora_linear_train,
    "lora_linear_backward": lora_linear_backward,
    "lora_add_": lora_add_,
    "lora_add_train_": lora_add_train_,
    "dropout_mask": dropout_mask,
}
