"""``merge_`` and ``switch_`` in plain torch: W ← W + sign · s · B A, a block of rows at a time.

Accumulated in float32 (float64 for a float64 weight) and rounded once to the dtype of the weight. Signatures are the
ops' own.
"""

import torch

from ..wide import wide

_ROWS = 256


def _merged(weight, terms, rows):
    """Rows of W + Σ scale · B A, in the dtype of the sum."""
    block = wide(weight[rows])
    for lora_a, lora_b, scale in terms:
        block = block + (lora_b[rows].to(block.dtype) @ lora_a.to(block.dtype)) * scale
    return block


def _row_blocks(weight):
    return [slice(i, i + _ROWS) for i in range(0, weight.shape[0], _ROWS)]


def merge_(weight, lora_a, lora_b, scaling, sign):
    with torch.no_grad():
        for rows in _row_blocks(weight):
            weight[rows] = _merged(weight, [(lora_a, lora_b, sign * scaling)], rows).to(weight.dtype)


def merge_list_(weights, lora_a, lora_b, scalings, sign):
    for terms in zip(weights, lora_a, lora_b, scalings, strict=True):
        merge_(*terms, sign)


def merge_is_finite(weight, lora_a, lora_b, scaling, sign):
    with torch.no_grad():
        finite = torch.ones((), dtype=torch.bool, device=weight.device)
        for rows in _row_blocks(weight):
            merged = _merged(weight, [(lora_a, lora_b, sign * scaling)], rows).to(weight.dtype)
            finite &= torch.isfinite(merged).all()
        return finite


def switch_(weight, old_a, old_b, old_scaling, new_a, new_b, new_scaling):
    with torch.no_grad():
        terms = [(old_a, old_b, -old_scaling), (new_a, new_b, new_scaling)]
        for rows in _row_blocks(weight):
            weight[rows] = _merged(weight, terms, rows).to(weight.dtype)


KERNELS = {"merge_": merge_, "merge_list_": merge_list_, "merge_is_finite": merge_is_finite, "switch_": switch_}
