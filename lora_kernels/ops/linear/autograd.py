"""Gradients of ``lora_linear`` and ``lora_add_``: one op forward, one op backward.

Saved for backward: x, h (M, R) and one bit an element of dropout; neither dropout(x) nor x Aᵀ at full width. x and the
weight are saved where a gradient reads them (a compiler finds that out by itself).
"""

import torch

from .. import dispatch
from ..wide import wide_dtype


def refuse_double_backward(name):
    """``create_graph=True`` would silently give a wrong second derivative."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: double backward (create_graph=True) is not supported")


def stand_in(dy, lora_a):
    """In the place of an ``x`` that was not saved: its shape and dtype, nothing written."""
    return dy.new_empty(dy.shape[0], lora_a.shape[-1])


def rows_of(x):
    """x (…, features) as a matrix; ``reshape(-1, features)`` can not tell the rows where there are no features."""
    return x if x.dim() == 2 else x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def distinct(tensors):
    """Under a compiler, which takes no tensor twice, views of those that come again."""
    if not torch.compiler.is_compiling():
        return tensors
    before = [any(tensor is other for other in tensors[:i]) for i, tensor in enumerate(tensors)]
    return [t.view_as(t) if again else t for t, again in zip(tensors, before, strict=True)]


class LoraLinear(torch.autograd.Function):
    @classmethod
    def apply(cls, compiling, *args):
        """``Function.apply``, whose checks for functorch, in Python, cost as much as a tiny layer."""
        if compiling:
            return super().apply(compiling, *args)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError("lora_linear: the transforms of torch.func (grad, vmap, jvp, ...) are not supported")
        unwrap = torch._C._functorch.unwrap_if_dead  # tensors that outlived a transform
        x, weight, bias, lora_a, lora_b, *rest = args
        bias = bias if bias is None else unwrap(bias)
        return _apply(compiling, unwrap(x), unwrap(weight), bias, unwrap(lora_a), unwrap(lora_b), *rest)

    @staticmethod
    def forward(ctx, compiling, x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, out_splits):
        op = dispatch.select("lora_linear_train", x)
        invariant = dispatch.batch_invariant
        y, h, mask = op(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, out_splits, invariant)
        needs = ctx.needs_input_grad
        x = x if compiling or needs[2] or needs[4] else None  # not where A is frozen, as in LoRA-FA
        weight = weight if compiling or needs[1] else None
        ctx.save_for_backward(x, weight, lora_a, lora_b, scaling, h, mask)
        ctx.dropout_p, ctx.out_splits, ctx.invariant = dropout_p, out_splits, invariant
        return y

    @staticmethod
    def backward(ctx, dy):
        refuse_double_backward("lora_linear")
        x, weight, lora_a, lora_b, scaling, h, mask = ctx.saved_tensors
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[1:6]
        dx = da = db = None
        if need_x or need_a or need_b:
            x = stand_in(dy, lora_a) if x is None else x
            op = dispatch.select("lora_linear_backward", x)
            dx, da, db = op(
                dy.contiguous(), x, weight, lora_a, lora_b, scaling, h, mask,
                ctx.dropout_p, ctx.out_splits, need_x, need_a, need_b, ctx.invariant,
            )  # fmt: skip
        dw = dy.t() @ x if need_w else None
        dbias = dy.sum(0) if need_bias else None
        grads = (dx if need_x else None, dw, dbias, da if need_a else None, db if need_b else None)
        return (None, *grads, None, None, None, None)


_apply = super(torch.autograd.Function, LoraLinear).apply


class LoraAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, lora_a, lora_b, scaling, dropout_p, seed):
        op = dispatch.select("lora_add_train_", x)
        ctx.invariant = dispatch.batch_invariant
        x2 = rows_of(x)
        h, mask = op(rows_of(y), x2, lora_a, lora_b, scaling, dropout_p, seed, ctx.invariant)
        ctx.mark_dirty(y)
        x2 = x2 if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(x2, lora_a, lora_b, scaling, h, mask)
        ctx.x_shape, ctx.dtype = x.shape, x.dtype
        ctx.dropout_p = dropout_p
        return y

    @staticmethod
    def backward(ctx, dy):
        refuse_double_backward("lora_add_")
        need_y, *needs = ctx.needs_input_grad[:4]
        return dy if need_y else None, *_of_update(ctx, dy, *needs), None, None, None


class LoraUpdate(torch.autograd.Function):
    """``s · (dropout(x) Aᵀ) Bᵀ`` in float32, for compilers, which trace no gradient of what a function writes."""

    @staticmethod
    def forward(ctx, x, lora_a, lora_b, scaling, dropout_p, seed):
        op = dispatch.select("lora_add_train_", x)
        ctx.invariant = dispatch.batch_invariant
        x2 = rows_of(x)
        update = x.new_zeros((x2.shape[0], lora_b.shape[0]), dtype=wide_dtype(x))
        h, mask = op(update, x2, lora_a, lora_b, scaling, dropout_p, seed, ctx.invariant)
        ctx.save_for_backward(x2, lora_a, lora_b, scaling, h, mask)
        ctx.x_shape, ctx.dtype = x.shape, x.dtype
        ctx.dropout_p = dropout_p
        return update.view(*x.shape[:-1], lora_b.shape[0])

    @staticmethod
    def backward(ctx, dy):
        return *_of_update(ctx, dy, *ctx.needs_input_grad[:3]), None, None, None


def _of_update(ctx, dy, need_x, need_a, need_b):
    """dX, dA, dB of ``s · (dropout(x) Aᵀ) Bᵀ``."""
    x, lora_a, lora_b, scaling, h, mask = ctx.saved_tensors
    if not (need_x or need_a or need_b):
        return None, None, None
    dy = rows_of(dy).to(ctx.dtype).contiguous()
    x = stand_in(dy, lora_a) if x is None else x
    op = dispatch.select("lora_linear_backward", x)
    dx, da, db = op(
        dy, x, None, lora_a, lora_b, scaling, h, mask,
        ctx.dropout_p, None, need_x, need_a, need_b, ctx.invariant,
    )  # fmt: skip
    return dx.view(ctx.x_shape) if need_x else None, da if need_a else None, db if need_b else None
