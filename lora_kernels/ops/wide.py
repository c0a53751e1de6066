"""The dtype that sums are formed in: float32, and float64 where the tensors are.

float64 is served by the references alone: it is the dtype of checks, not of speed.
"""

import torch


def wide_dtype(*tensors):
    """torch.float64 when one of the tensors is, torch.float32 otherwise."""
    return torch.float64 if any(tensor.dtype is torch.float64 for tensor in tensors) else torch.float32


def wide(tensor):
    """The tensor in the dtype that it is summed in."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()
