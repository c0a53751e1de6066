"""``grouped_lora_linear``: projections that read the same input (Q, K, V; gate, up) in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import checks, dispatch
from ..linear.api import autocast_dtype, cast_factors, lora_linear
from ..linear.autograd import distinct, rows_of
from ..scalars import scaling_tensor
from .autograd import GroupedLoraLinear, run


def grouped_lora_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scalings: Sequence[float | Tensor],
) -> tuple[Tensor, ...]:
    """``x Wᵢᵀ + biasᵢ + scalingᵢ · (x Aᵢᵀ) Bᵢᵀ`` for each projection i, with one shrink for all of them.

    Differentiable in ``x``, ``weights``, ``biases``, ``lora_a`` and ``lora_b``; not twice. The gradient of ``x`` is
    summed over the projections before it is rounded, where eager rounds each. No LoRA dropout: a projection of its own
    draws a mask of its own. Under autocast ``x``, ``weights`` and ``biases`` are cast.

    Args:
        x: (…, in_features); float32, float16 or bfloat16.
        weights: a tensor (out_features, in_features) a projection, dtype of ``x``; widths may differ.
        biases: None, or (out_features) or None a projection.
        lora_a: (rank, in_features) a projection, dtype of ``x`` (under autocast any) or float32, one for all; ranks may
            differ.
        lora_b: (out_features, rank) a projection, one dtype for all.
        scalings: float or 0-d tensor a projection.

    Returns:
        A tuple of (…, out_features), dtype of ``x``: one a projection.

    Raises:
        ValueError, TypeError: an argument of the wrong length, shape, dtype or device; the message names it.
    """
    checks.tensor("x", x)
    biases = [None] * len(weights) if biases is None else biases
    _check_lengths(weights, biases=biases, lora_a=lora_a, lora_b=lora_b, scalings=scalings)
    x2 = rows_of(x) if x.dim() else x
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype is not torch.float64:
        x2, weights = x2.to(dtype), [weight.to(dtype) for weight in weights]
        biases = [bias if bias is None else bias.to(dtype) for bias in biases]
        lora_a, lora_b = cast_factors(lora_a, dtype), cast_factors(lora_b, dtype)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        with checks.of(f"projection {i}"):
            checks.linear(x2, weight, bias, lora_a[i], lora_b[i], None)
            checks.same_dtype("lora_a", lora_a[i], lora_a[0])
            checks.same_dtype("lora_b", lora_b[i], lora_b[0])
    scalings = [scaling_tensor(scaling, x2, f"scalings[{i}]") for i, scaling in enumerate(scalings)]
    if dispatch.jit_traces():  # which loses an op that writes to the tensors of a list
        apart = zip(weights, biases, lora_a, lora_b, scalings, strict=True)
        return tuple([lora_linear(x.to(x2.dtype), *projection) for projection in apart])
    if any(bias is None for bias in biases):  # a bias each, or none at all
        missing = all(bias is None for bias in biases)
        pairs = zip(biases, weights, strict=True)
        biases = [] if missing else [x2.new_zeros(len(w)) if bias is None else bias for bias, w in pairs]
    tensors = (*weights, *biases, *lora_a, *lora_b)
    grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x2, *tensors))
    if grad or forward_ad._current_level >= 0:  # the function refuses tangents
        y = GroupedLoraLinear.apply(len(weights), x2, *distinct([*tensors, *scalings]))
    else:
        y, _ = run(x2, list(weights), list(biases), list(lora_a), list(lora_b), scalings, False)
    return tuple(y) if x.dim() == 2 else tuple([part.view(*x.shape[:-1], part.shape[-1]) for part in y])


def _check_lengths(weights, **others):
    if not isinstance(weights, (list, tuple)) or not weights:
        raise TypeError(f"weights: expected a list of at least one tensor, got {type(weights).__name__}")
    for name, value in others.items():
        if not isinstance(value, (list, tuple)) or len(value) != len(weights):
            got = len(value) if isinstance(value, (list, tuple)) else type(value).__name__
            raise ValueError(f"{name}: expected {len(weights)} entries, one a projection, got {got}")
