"""The rows of ``W + s · B A``, a block at a time in float32.

The closed form ``‖W‖² + 2 s ⟨W Aᵀ, B⟩ + s² ⟨B A Aᵀ, B⟩`` has fewer steps, but where the update cancels a row its
float32 terms leave an error of 3e-4 ‖W‖ in a norm near zero, and the norm is divided by. A block that fits the
cache costs the same read of W and has no such rows.
"""

import torch

_BLOCK = 1 << 17  # elements of W in a block: half a MiB in float32


def _blocks(weight, lora_a, lora_b, scaling):
    """``rows, W[rows], s · B[rows], A`` in float32 for each block of rows."""
    a, b = lora_a.float(), lora_b.float() * scaling
    step = max(8, _BLOCK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        yield rows, weight[rows].float(), b[rows], a


def row_norm(weight, lora_a, lora_b, scaling):
    norm = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for rows, block, b, a in _blocks(weight, lora_a, lora_b, scaling):
        torch.linalg.vector_norm(torch.addmm(block, b, a), dim=1, out=norm[rows])
    return norm


def scale_merge_(weight, lora_a, lora_b, scaling, factors):
    for rows, block, b, a in _blocks(weight, lora_a, lora_b, scaling):
        weight[rows] = torch.addmm(block, b, a).mul_(factors[rows, None])
    return weight


def scale_unmerge_(weight, lora_a, lora_b, scaling, factors):
    for rows, block, b, a in _blocks(weight, lora_a, lora_b, scaling):
        weight[rows] = torch.addmm(block / factors[rows, None], b, a, alpha=-1)
    return weight
