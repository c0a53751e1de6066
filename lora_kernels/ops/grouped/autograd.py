"""Gradients of ``grouped_lora_linear``: the gradient of x summed over the projections in one op."""

import itertools

import torch

from .. import dispatch
from ..linear.autograd import refuse_double_backward, stand_in


class GroupedLoraLinear(torch.autograd.Function):
    """Tensors after ``x``: weights, biases (none, or one a projection), A, B, scalings; ``count`` projections."""

    @staticmethod
    def forward(ctx, count, x, *tensors):
        weights, biases, lora_a, lora_b, scalings = parts(tensors, count)
        ctx.invariant = dispatch.batch_invariant
        y, h = run(x, weights, biases, lora_a, lora_b, scalings, True)
        compiling, needs = torch.compiler.is_compiling(), ctx.needs_input_grad
        need_w, _, need_a, *_ = parts(needs[2:], count, len(biases) > 0)
        x = x if compiling or any(need_w) or any(need_a) else None
        weights = weights if compiling or needs[1] else [None] * count
        ctx.save_for_backward(x, *weights, *lora_a, *lora_b, *scalings, h)
        ctx.count, ctx.with_biases = count, len(biases) > 0  # torch 2.10 does not compile bool() of a list
        return tuple(y)

    @staticmethod
    def backward(ctx, *dy):
        refuse_double_backward("grouped_lora_linear")
        x, *tensors, h = ctx.saved_tensors
        weights, _, lora_a, lora_b, scalings = parts(tensors, ctx.count, False)
        _, need_x, *needs = ctx.needs_input_grad
        need_w, need_bias, need_a, need_b, _ = parts(needs, ctx.count, ctx.with_biases)
        dy = [grad.contiguous() for grad in dy]
        da = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in lora_a] if any(need_a) else []
        db = [torch.empty_like(b, memory_format=torch.contiguous_format) for b in lora_b] if any(need_b) else []
        dx = None
        if need_x or da or db:
            x = stand_in(dy[0], lora_a[0]) if x is None else x
            if not need_x:  # of the weights the shape alone is read
                shapes = zip(dy, lora_a, lora_b, strict=True)
                weights = [grad.new_empty(()).expand(len(b), a.shape[1]) for grad, a, b in shapes]
            op = dispatch.select("grouped_lora_backward", x)
            dx = op(x, dy, weights, lora_a, lora_b, scalings, h, da, db, need_x, ctx.invariant)
        dw = [grad.t() @ x if need else None for grad, need in zip(dy, need_w, strict=True)]
        dbias = [grad.sum(0) if need else None for grad, need in zip(dy, need_bias, strict=False)]
        da = [a if need else None for a, need in zip(da or need_a, need_a, strict=True)]
        db = [b if need else None for b, need in zip(db or need_b, need_b, strict=True)]
        return (None, dx if need_x else None, *dw, *dbias, *da, *db, *[None] * ctx.count)


def parts(values, count, biases=None):
    """Weights, biases, A, B and scalings out of one flat sequence."""
    values = list(values)
    if biases is None:
        biases = len(values) == 5 * count
    bounds = [0, count, count * (1 + biases), count * (2 + biases), count * (3 + biases), count * (4 + biases)]
    return [values[first:last] for first, last in itertools.pairwise(bounds)]


def run(x, weights, biases, lora_a, lora_b, scalings, need_h):
    """(one y a projection, h or an empty tensor) of the op, without gradients."""
    y = [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights]
    op = dispatch.select("grouped_lora_linear", x)
    return y, op(x, weights, biases, lora_a, lora_b, scalings, y, need_h, dispatch.batch_invariant)
