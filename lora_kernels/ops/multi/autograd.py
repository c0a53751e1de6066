"""Gradients of ``multi_lora_linear``: several adapters trained in one batch."""

import torch

from .. import dispatch
from ..linear.autograd import refuse_double_backward


class MultiLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, listed, x, weight, bias, slot_scalings, plan, out_splits, *adapters):
        from .api import run

        y = run(listed, x, weight, bias, slot_scalings, plan, out_splits, adapters)
        compiling, needs = torch.compiler.is_compiling(), ctx.needs_input_grad
        x = x if compiling or needs[2] or any(needs[7:]) else None
        weight = weight if compiling or needs[1] else None
        ctx.save_for_backward(x, weight, slot_scalings, plan.row_order, plan.segment_starts, *adapters)
        ctx.listed, ctx.out_splits = listed, out_splits
        return y

    @staticmethod
    def backward(ctx, dy):
        refuse_double_backward("multi_lora_linear")
        x, weight, slot_scalings, row_order, segment_starts, *adapters = ctx.saved_tensors
        _, need_x, need_w, need_bias, _, _, _, *need_adapters = ctx.needs_input_grad
        half = len(adapters) // 2
        need_a, need_b = any(need_adapters[:half]), any(need_adapters[half:])
        grads_a = [_new_grad(tensor) for tensor in adapters[:half]] if need_a else []
        grads_b = [_new_grad(tensor) for tensor in adapters[half:]] if need_b else []
        dx = None
        if need_x or need_a or need_b:
            x = dy.new_empty(dy.shape[0], weight.shape[1]) if x is None else x  # of which the shape alone is read
            op = dispatch.select("multi_lora_backward", x)
            per_slot = list if ctx.listed else _unbind
            dx = op(
                dy.contiguous(), x, weight, per_slot(adapters[:half]), per_slot(adapters[half:]), slot_scalings,
                row_order, segment_starts, ctx.out_splits, per_slot(grads_a), per_slot(grads_b), need_x,
            )  # fmt: skip
        dw = dy.t() @ x if need_w else None
        dbias = dy.sum(0) if need_bias else None
        grads = [*(grads_a or [None] * half), *(grads_b or [None] * half)]
        grads = [grad if need else None for grad, need in zip(grads, need_adapters, strict=True)]
        return (None, dx if need_x else None, dw, dbias, None, None, None, *grads)


def _new_grad(tensor):
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _unbind(banks):
    return list(banks[0].unbind(0)) if banks else []


def live_part(a_bank, b_bank, slot_ranks, out_splits):
    """Banks with everything beyond the live ranks replaced by zeros, so that its gradient is zero too."""
    rank = torch.arange(a_bank.shape[-2], device=a_bank.device)
    live = rank < slot_ranks.unsqueeze(-1)
    if out_splits is None:
        by_column = live.view(live.shape[0], 1, -1)
    else:
        live = live if live.dim() == 3 else live.unsqueeze(1).expand(-1, len(out_splits), -1)
        widths = torch.tensor(out_splits, device=live.device)
        by_column = live.repeat_interleave(widths, dim=1, output_size=b_bank.shape[1])
    zero_a, zero_b = a_bank.new_zeros(()), b_bank.new_zeros(())
    return torch.where(live.view(*a_bank.shape[:-1], 1), a_bank, zero_a), torch.where(by_column, b_bank, zero_b)
