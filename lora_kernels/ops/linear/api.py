"""``lora_linear`` and ``lora_add_``: what users call.

Checks and reshapes once, then one op; gradients by ``torch.autograd.Function`` outside the op.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import checks, dispatch, library
from ..scalars import is_scaling, scaling_tensor, seed_tensor
from .autograd import LoraAdd, LoraLinear, LoraUpdate, rows_of

_linear = library.op("lora_linear")


def autocast_dtype(device_type):
    """What autocast casts a linear layer's tensors to; None where it is off."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def flat_and_cast(x, weight, bias):
    """(x as a matrix, weight, bias, type of the device); in autocast's dtype where it is on."""
    x2 = x if x.dim() == 2 else rows_of(x)
    device_type = "cpu" if x.is_cpu else x.device.type  # a device is an object to make
    dtype = autocast_dtype(device_type)
    if dtype is not None and x.dtype is not torch.float64:
        x2, weight = x2.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    return x2, weight, bias, device_type


def cast_factors(factors, dtype):
    """Factors for a product in autocast's dtype: in it, or in float32."""
    return [factor if factor.dtype in (dtype, torch.float32) else factor.to(dtype) for factor in factors]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    out_splits: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ`` in one op (LoRA, Hu et al. 2021, arXiv:2106.09685).

    Differentiable in ``x``, ``weight``, ``bias``, ``lora_a`` and ``lora_b``; not twice. Under autocast ``x``,
    ``weight`` and ``bias`` are cast as ``torch.nn.functional.linear`` casts them.

    Args:
        x: (…, in_features); float32, float16 or bfloat16; float64 is computed by the reference.
        weight: (out_features, in_features), dtype of ``x``.
        bias: (out_features) or None, dtype of ``x``.
        lora_a: (rank, in_features), dtype of ``x`` (under autocast any) or float32; (slices, rank, in_features) with
            ``out_splits``.
        lora_b: (out_features, rank), dtype of ``x`` or float32.
        scaling: float, or 0-d tensor (no recompile per value, changeable inside a CUDA graph).
        dropout_p: probability of dropping an element of ``x`` on the LoRA path, 0 <= p < 1.
        dropout_seed: 0-d int64 tensor; None draws one from torch's generator (inductor from its own, unless its
            ``fallback_random`` is set).
        out_splits: widths of the slices of a stacked projection (Q, K, V); they add up to out_features.
        out: (…, out_features) tensor to write into; no gradients.

    Returns:
        (…, out_features), dtype of ``x``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; the message names it.
    """
    try:
        x2, weight, bias, device_type = flat_and_cast(x, weight, bias)
        if (
            lora_a.dtype is not x2.dtype
            and lora_a.dtype is not torch.float32
            and autocast_dtype(device_type) is x2.dtype
        ):
            lora_a, lora_b = lora_a.to(x2.dtype), lora_b.to(x2.dtype)
        grad = torch.is_grad_enabled() and (
            x2.requires_grad
            or weight.requires_grad
            or lora_a.requires_grad
            or lora_b.requires_grad
            or (bias is not None and bias.requires_grad)
        )
        compiling = torch.compiler.is_compiling()
        if grad and not compiling and torch._C._is_tracing():
            grad = False  # see dispatch.jit_traces
        if compiling or dispatch.check_first or device_type != "cpu":
            checks.linear(x2, weight, bias, lora_a, lora_b, out_splits)
        if scaling.__class__ is not torch.Tensor or not is_scaling(scaling, x2):
            scaling = scaling_tensor(scaling, x2)
        if out is not None:
            return _write(out, x, x2, weight, bias, lora_a, lora_b, scaling, dropout_p, out_splits, grad)
        if grad or dropout_p != 0.0 or forward_ad._current_level >= 0:  # the function refuses tangents
            checks.dropout(dropout_p)
            seed = seed_tensor(dropout_seed, x2) if dropout_p else None
            y = LoraLinear.apply(compiling, x2, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, out_splits)
        else:
            native = dispatch.forced is None and x2.dtype is not torch.float64
            op = _linear if native else dispatch.select("lora_linear", x2)
            y = op(x2, weight, bias, lora_a, lora_b, scaling, out_splits, dispatch.batch_invariant)
    except (RuntimeError, AttributeError, IndexError):
        _explain_refusal(x, weight, bias, lora_a, lora_b, out_splits)
        raise
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _explain_refusal(x, weight, bias, lora_a, lora_b, out_splits):
    """After a kernel refused its input: the error that names the argument, if an argument is to blame."""
    for name, value in (("x", x), ("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        checks.tensor(name, value)
    base = (x, weight, bias)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype is not torch.float64:
        base = [value if value is None else value.to(dtype) for value in base]
    checks.linear(*base, lora_a, lora_b, out_splits)


def _write(out, x, x2, weight, bias, lora_a, lora_b, scaling, dropout_p, out_splits, grad):
    checks.out(out, x.to(x2.dtype), weight)
    checks.in_place("out", out, x=x2, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, scaling=scaling)
    if grad or dropout_p or (out.requires_grad and torch.is_grad_enabled()):
        raise ValueError("out: can not be combined with gradients or dropout; call under torch.no_grad()")
    rows = _as_rows(out)
    if rows is None:
        return out.copy_(lora_linear(x, weight, bias, lora_a, lora_b, scaling, out_splits=out_splits))
    op = dispatch.select("lora_linear_out", x2)
    op(rows, x2, weight, bias, lora_a, lora_b, scaling, out_splits, dispatch.batch_invariant)
    mark_written(out)
    return out


def mark_written(*tensors):
    """Bumps the version counters, which an op marked ``Tensor(a!)`` does not do by itself."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def lora_add_(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """``y += scaling · (dropout(x) Aᵀ) Bᵀ`` in place, for any base product: quantised, sharded, a module's own.

    Differentiable in ``y``, ``x``, ``lora_a`` and ``lora_b``; not twice.

    Args:
        y: (…, out_features), float32, float16 or bfloat16; the dtype of ``x`` or float32. Written.
        x: (…, in_features).
        lora_a, lora_b, scaling, dropout_p, dropout_seed: as in :func:`lora_linear`.

    Returns:
        ``y``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; the message names it.
    """
    _check_add(y, x, lora_a, lora_b)
    checks.dropout(dropout_p)
    scaling = scaling_tensor(scaling, x)
    if forward_ad._current_level >= 0:
        raise RuntimeError("lora_add_: forward-mode differentiation is not supported")
    seed = seed_tensor(dropout_seed, x) if dropout_p else None
    grad = torch.is_grad_enabled() and (
        y.requires_grad or x.requires_grad or lora_a.requires_grad or lora_b.requires_grad
    )
    grad = grad and not dispatch.jit_traces()
    if grad and y.requires_grad and (y if y._base is None else y._base).is_leaf:
        raise ValueError("y: a leaf that requires grad, or a view of one, can not be written in place; pass y.clone()")
    if grad and torch.compiler.is_compiling():
        return y.add_(LoraUpdate.apply(x, lora_a, lora_b, scaling, dropout_p, seed))
    rows = _as_rows(y)
    if rows is None:
        contiguous = y.clone(memory_format=torch.contiguous_format)
        return y.copy_(lora_add_(contiguous, x, lora_a, lora_b, scaling, dropout_p=dropout_p, dropout_seed=seed))
    if grad:
        return LoraAdd.apply(y, x, lora_a, lora_b, scaling, dropout_p, seed)
    x2 = rows_of(x)
    if dropout_p:
        op = dispatch.select("lora_add_train_", x)
        op(rows, x2, lora_a, lora_b, scaling, dropout_p, seed, dispatch.batch_invariant)
    else:
        op = dispatch.select("lora_add_", x)
        op(rows, x2, lora_a, lora_b, scaling, dispatch.batch_invariant)
    mark_written(y)
    return y


def _as_rows(y):
    """``y`` as a 2-D tensor over the same memory with unit column stride, or None where there is no such view."""
    if y.shape[-1] > 1 and y.stride(-1) != 1:
        return None
    if y.dim() == 2 or y.numel() == 0:
        return rows_of(y)
    try:
        return y.view(-1, y.shape[-1])
    except RuntimeError:
        return None


def _check_add(y, x, lora_a, lora_b):
    checks.tensor("y", y)
    checks.tensor("x", x)
    if x.dim() == 0 or y.dim() == 0:
        raise ValueError("x, y: expected at least one dimension, got a 0-d tensor")
    checks.floating("x", x)
    if y.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"y: expected {x.dtype} (the dtype of x) or torch.float32, got {y.dtype}")
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y: expected leading dimensions {tuple(x.shape[:-1])} (those of x), got {tuple(y.shape)}")
    checks.adapter(lora_a, lora_b, x.shape[-1], y.shape[-1], x.dtype, x)
    checks.same_device(x, y=y)
    checks.in_place("y", y, x=x, lora_a=lora_a, lora_b=lora_b)
