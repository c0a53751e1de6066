"""The rows of ``W + s · B A``, a block at a time in float32 (float64 where W is).

The closed form ``‖W‖² + 2 s ⟨W Aᵀ, B⟩ + s² ⟨B A Aᵀ, B⟩`` has fewer steps, but where the update cancels a row its
float32 terms leave an error of 3e-4 ‖W‖ in a norm near zero, and the norm is divided by; with the search for such
rows it is not faster on one thread either. A forward has few blocks for its norms, in one buffer, as each block starts
and joins the threads three times, which costs more than the work where other processes share the cores.
"""

import torch

from ..wide import wide, wide_dtype

_BLOCK = 1 << 17  # elements of W in a block: half a MiB in float32
_NORM_BLOCK = 1 << 20  # the same for the norms: 4 MiB


def _blocks(weight, lora_a, lora_b, scaling):
    """``rows, W[rows], s · B[rows], A`` in the dtype of the sum for each block of rows."""
    dtype = wide_dtype(weight)
    a, b = lora_a.to(dtype), lora_b.to(dtype) * scaling
    step = max(8, _BLOCK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        yield rows, wide(weight[rows]), b[rows], a


def row_norm(weight, lora_a, lora_b, scaling):
    rows, columns = weight.shape
    dtype = wide_dtype(weight)
    a, b = lora_a.to(dtype), lora_b.to(dtype) * scaling
    step = min(rows, max(8, _NORM_BLOCK // max(1, columns)))
    norm = torch.empty(rows, dtype=dtype, device=weight.device)
    buffer = torch.empty(step, columns, dtype=dtype, device=weight.device)
    for start in range(0, rows, max(1, step)):
        part = slice(start, start + step)
        block = buffer[: rows - start].copy_(weight[part]).addmm_(b[part], a)
        torch.linalg.vector_norm(block, dim=1, out=norm[part])
    return norm


def scale_merge_(weight, lora_a, lora_b, scaling, factors):
    for rows, block, b, a in _blocks(weight, lora_a, lora_b, scaling):
        weight[rows] = torch.addmm(block, b, a).mul_(factors[rows, None])
    return weight


def scale_unmerge_(weight, lora_a, lora_b, scaling, factors):
    for rows, block, b, a in _blocks(weight, lora_a, lora_b, scaling):
        weight[rows] = torch.addmm(block / factors[rows, None], b, a, alpha=-1)
    return weight


KERNELS = {"row_norm": row_norm}
