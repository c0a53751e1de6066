"""What the ops should give: in float64 (exact), and as eager PyTorch computes it in the same dtype."""

import torch
import torch.nn.functional as F


def _double(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def _update(x, lora_a, lora_b, scaling, out_splits):
    """s · (x Aᵀ) Bᵀ in the dtypes that come in."""
    if out_splits is None:
        return ((x.to(lora_a.dtype) @ lora_a.t()) @ lora_b.t()) * scaling
    blocks, start = [], 0
    for index, width in enumerate(out_splits):
        b = lora_b[start : start + width]
        blocks.append(((x.to(lora_a.dtype) @ lora_a[index].t()) @ b.t()) * scaling)
        start += width
    return torch.cat(blocks, dim=-1)


def exact_lora_linear(x, weight, bias, lora_a, lora_b, scaling, out_splits=None, keep=None):
    """``lora_linear`` in float64. ``keep`` (shape of x): multipliers of the LoRA path's input, for dropout."""
    x, weight, bias, lora_a, lora_b, scaling = _double(x, weight, bias, lora_a, lora_b, torch.as_tensor(scaling))
    return F.linear(x, weight, bias) + _update(x if keep is None else x * keep, lora_a, lora_b, scaling, out_splits)


def eager_lora_linear(x, weight, bias, lora_a, lora_b, scaling, out_splits=None, keep=None):
    """``lora_linear`` as PEFT's eager code rounds it: base, shrink, expand, scale and sum each in their dtype."""
    dropped = x if keep is None else x * keep.to(x.dtype)
    scaling = float(scaling)
    return (F.linear(x, weight, bias) + _update(dropped, lora_a, lora_b, scaling, out_splits)).to(x.dtype)


def exact_multi_lora_linear(x, weight, bias, a_bank, b_bank, slot_scalings, token_slots, slot_ranks, out_splits=None):
    """``multi_lora_linear`` in float64, a row at a time."""
    y = F.linear(*_double(x, weight, bias))
    for row, slot in enumerate(token_slots.tolist()):
        if slot >= 0:
            rank = int(slot_ranks[slot])
            a, b = a_bank[slot, ..., :rank, :].double(), b_bank[slot, :, :rank].double()
            y[row] += _update(x[row : row + 1].double(), a, b, slot_scalings[slot].double(), out_splits)[0]
    return y


def exact_merge(weight, *terms):
    """``W + Σ s · B A`` in float64; ``terms`` are (lora_a, lora_b, s)."""
    result = weight.double()
    for lora_a, lora_b, scale in terms:
        result = result + (lora_b.double() @ lora_a.double()) * torch.as_tensor(scale).double()
    return result
