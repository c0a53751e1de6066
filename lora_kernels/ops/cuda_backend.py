"""What the C++ CUDA kernels cannot take, by op: asked before a call, so that a refusal changes nothing.

``LIMITS`` names every op that has a kernel and says in words, for ``explain()``, what ``REFUSED`` decides for one call.
The functions of ``REFUSED`` have the ops' own signatures and return a reason, or None.
"""

import torch

LIMITS = {
    "merge_, merge_list_, merge_is_finite, switch_": "a weight whose columns are not adjacent is refused",
    "merge_exact_, unmerge_exact_, switch_exact_": (
        "the host waits, since the size of a residual depends on the data: not for graph capture"
    ),
    "lora_linear, lora_linear_out, lora_add_, multi_lora_linear, lora_shrink, lora_expand_": (
        "float16 and bfloat16, adapters of the same dtype, no stacked projections"
    ),
    "lora_linear_train, lora_linear_backward": "the same, without dropout",
}


def _columns_apart(weight, *_):
    if weight.dim() == 2 and weight.shape[1] > 1 and weight.stride(1) != 1:
        return f"weight: expected adjacent columns, got a column stride of {weight.stride(1)}"
    return None


def _any_columns_apart(weights, *_):
    return next(filter(None, map(_columns_apart, weights)), None)


def _dtypes(x, **others):
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"x: expected float16 or bfloat16, got {x.dtype}"
    for name, tensor in others.items():
        if tensor.dtype != x.dtype:
            return f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}"
    return None


def _slices(out_splits, *banks):
    if out_splits is not None or any(bank.dim() == 4 for bank in banks):
        return "out_splits: expected None, no kernel for stacked projections"
    return None


def _linear(x, weight, bias, lora_a, lora_b, scaling, out_splits, *_):
    return _dtypes(x, lora_a=lora_a, lora_b=lora_b) or _slices(out_splits)


def _linear_out(out, *args):
    return _linear(*args)


def _train(x, weight, bias, lora_a, lora_b, scaling, dropout_p, dropout_seed, out_splits, *_):
    if dropout_p:
        return "dropout_p: expected 0, no kernel for dropout"
    return _linear(x, weight, bias, lora_a, lora_b, scaling, out_splits)


def _add(y, x, lora_a, lora_b, *_):
    return _dtypes(x, lora_a=lora_a, lora_b=lora_b)


def _backward(dy, x, weight, lora_a, lora_b, scaling, h, mask, dropout_p, out_splits, *_):
    if mask.numel():
        return "mask: expected none, no kernel for dropout"
    return _dtypes(x, dy=dy, lora_a=lora_a, lora_b=lora_b) or _slices(out_splits)


def _slot_ranks(slot_ranks):
    if slot_ranks is not None and slot_ranks.dim() != 1:
        return "slot_ranks: expected one dimension, no kernel for stacked projections"
    return None


def _multi(x, weight, bias, a_bank, b_bank, slot_scalings, slot_ranks, row_order, segment_starts, out_splits, *_):
    return _dtypes(x, a_bank=a_bank, b_bank=b_bank) or _slices(out_splits, a_bank) or _slot_ranks(slot_ranks)


def _shrink(x, a_bank, slot_ranks, *_):
    return _dtypes(x, a_bank=a_bank) or _slices(None, a_bank) or _slot_ranks(slot_ranks)


def _expand(y, h, b_bank, slot_scalings, slot_ranks, row_order, segment_starts, out_splits, *_):
    return _dtypes(y, b_bank=b_bank) or _slices(out_splits) or _slot_ranks(slot_ranks)


REFUSED = {
    "merge_": _columns_apart,
    "merge_list_": _any_columns_apart,
    "merge_is_finite": _columns_apart,
    "switch_": _columns_apart,
    "lora_linear": _linear,
    "lora_linear_out": _linear_out,
    "lora_add_": _add,
    "lora_linear_train": _train,
    "lora_linear_backward": _backward,
    "multi_lora_linear": _multi,
    "lora_shrink": _shrink,
    "lora_expand_": _expand,
}


def names():
    """The ops that have a CUDA kernel."""
    return sorted(name for names in LIMITS for name in names.split(", "))


def refusal(name, args):
    """Why the op can not run on these arguments; None when it can."""
    check = REFUSED.get(name)
    return check(*args) if check and args else None
