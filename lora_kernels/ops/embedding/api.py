"""``lora_embedding``: rows of an embedding and of its update in one call."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import checks, dispatch
from ..linear.autograd import refuse_double_backward
from ..scalars import scaling_tensor


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """``W[ids] + scaling · (Aᵀ[ids]) Bᵀ``, rounded once.

    Differentiable in ``lora_a`` and ``lora_b``; not twice, and not in ``weight``.

    Args:
        ids: (…) int32 or int64, each in [0, num_embeddings). Where a GPU kernel meets another, the row is NaN.
        weight: (num_embeddings, embedding_dim); float32, float16, bfloat16 or float64.
        lora_a: (rank, num_embeddings), dtype of ``weight`` or float32.
        lora_b: (embedding_dim, rank), dtype of ``lora_a``.
        scaling: float, or 0-d tensor.
        padding_idx: the entry of ``lora_a`` that gets no gradient, as in ``torch.nn.functional.embedding``.

    Returns:
        (…, embedding_dim), dtype of ``weight``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; the message names it.
        IndexError: on a CPU, an id out of range.
    """
    padding_idx = _check(ids, weight, lora_a, lora_b, padding_idx)
    scaling = scaling_tensor(scaling, weight)
    flat = ids.reshape(-1).long()
    grad = torch.is_grad_enabled() and (lora_a.requires_grad or lora_b.requires_grad)
    grad = grad and not dispatch.jit_traces()
    if grad or forward_ad._current_level >= 0:  # the function refuses tangents
        y = LoraEmbedding.apply(flat, weight.detach(), lora_a, lora_b, scaling, padding_idx)
    else:
        y = _forward(flat, weight, lora_a, lora_b, scaling)
    return y.view(*ids.shape, weight.shape[1])


def _forward(ids, weight, lora_a, lora_b, scaling):
    op = dispatch.select("lora_embedding", weight)
    return op(ids, weight, lora_a, lora_b, scaling, dispatch.batch_invariant)


class LoraEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, lora_a, lora_b, scaling, padding_idx):
        ctx.save_for_backward(ids, lora_a, lora_b, scaling)
        ctx.padding_idx = padding_idx
        return _forward(ids, weight, lora_a, lora_b, scaling)

    @staticmethod
    def backward(ctx, dy):
        refuse_double_backward("lora_embedding")
        ids, lora_a, lora_b, scaling = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad[2:4]
        op = dispatch.select("lora_embedding_backward", dy)
        da, db = op(dy.contiguous(), ids, lora_a, lora_b, scaling, ctx.padding_idx, need_a, need_b)
        return None, None, da if need_a else None, db if need_b else None, None, None


def _check(ids, weight, lora_a, lora_b, padding_idx):
    checks.tensor("ids", ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: expected torch.int32 or torch.int64, got {ids.dtype}")
    checks.tensor("weight", weight, 2)
    checks.floating("weight", weight)
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError("weight: gradients are not computed; detach it, or use torch.nn.functional.embedding")
    checks.adapter(lora_a, lora_b, *weight.shape, weight.dtype, weight)
    checks.same_dtype("lora_b", lora_b, lora_a)
    checks.same_device(weight, ids=ids)
    if padding_idx is None:
        return -1
    if not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx: expected an int or None, got {padding_idx!r}")
    if not -len(weight) <= padding_idx < len(weight):
        raise ValueError(f"padding_idx: expected an entry of {len(weight)} embeddings, got {padding_idx}")
    return padding_idx % len(weight)
