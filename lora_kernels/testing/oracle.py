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


def eager_multi_lora_linear(x, weight, bias, a_bank, b_bank, slot_scalings, token_slots, slot_ranks, out_splits=None):
    """``multi_lora_linear`` as :func:`eager_lora_linear` rounds it, a row at a time."""
    y = F.linear(x, weight, bias)
    for row, slot in enumerate(token_slots.tolist()):
        if slot >= 0:
            rank = int(slot_ranks[slot])
            adapter = (a_bank[slot, ..., :rank, :], b_bank[slot, :, :rank], slot_scalings[slot])
            y[row] = eager_lora_linear(x[row : row + 1], weight, bias, *adapter, out_splits)[0]
    return y


def eager_lora_embedding(ids, weight, lora_a, lora_b, scaling, padding_idx=None):
    """``lora_embedding`` as PEFT's eager code rounds it; in float64 where the tensors are."""
    update = F.linear(F.embedding(ids, lora_a.t(), padding_idx), lora_b) * scaling
    return (F.embedding(ids, weight) + update).to(weight.dtype)


def embedding_results(function, case, dtype=None, padding_idx=None):
    """[y, dA, dB] of a function with the arguments of ``lora_embedding``, for a dY from a fixed seed; ``dtype``: cast
    the case's tensors to it first."""
    weight, lora_a, lora_b = (t.detach().to(dtype or t.dtype) for t in (case.weight, case.lora_a, case.lora_b))
    leaves = [lora_a.requires_grad_(), lora_b.requires_grad_()]
    y = function(case.ids, weight, *leaves, case.scaling, padding_idx=padding_idx)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(case.weight.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.device, y.dtype))]


def exact_merge(weight, *terms):
    """``W + Σ s · B A`` in float64; ``terms`` are (lora_a, lora_b, s)."""
    result = weight.double()
    for lora_a, lora_b, scale in terms:
        result = result + (lora_b.double() @ lora_a.double()) * torch.as_tensor(scale).double()
    return result
