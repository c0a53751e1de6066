"""Scaling and dropout seed as the ops take them: 0-d tensors on the device of ``x``."""

import torch

from .wide import wide_dtype


def is_scaling(scaling, like):
    """Whether a tensor can be handed to an op as it is."""
    return (
        (scaling.dtype is torch.float32 or scaling.dtype is torch.float64 is like.dtype)
        and scaling.dim() == 0
        and ((scaling.is_cpu and like.is_cpu) or scaling.device == like.device)
        and not scaling.requires_grad
    )


def scaling_tensor(scaling, like, name="scaling"):
    """0-d float32 tensor (float64 beside float64) on the device of ``like`` from a float or a 0-d tensor."""
    if isinstance(scaling, torch.Tensor):
        if scaling.dim() != 0 or not scaling.is_floating_point():
            raise ValueError(
                f"{name}: expected a float or a 0-d floating tensor, got {scaling.dtype} {tuple(scaling.shape)}"
            )
        if scaling.requires_grad:
            raise ValueError(f"{name}: gradients with respect to the scaling are not computed; detach it")
        if is_scaling(scaling, like):
            return scaling
        return scaling.to(device=like.device, dtype=wide_dtype(like))
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"{name}: expected a float or a 0-d tensor, got {type(scaling).__name__}")
    return torch.full((), scaling, dtype=wide_dtype(like), device=like.device)


def seed_tensor(dropout_seed, like):
    """0-d int64 tensor on the device of ``like``; drawn from torch's generator when None."""
    if dropout_seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=like.device)
    if not isinstance(dropout_seed, torch.Tensor) or dropout_seed.dtype != torch.int64 or dropout_seed.dim() != 0:
        raise TypeError(f"dropout_seed: expected a 0-d int64 tensor, got {dropout_seed!r}")
    return dropout_seed.to(like.device)
