"""Calls from several Python threads at once, as a server makes them, give the bits of calls one after the other."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lora_kernels import ops
from lora_kernels.testing import make_linear, make_multi

# M, K, N, R: few rows, rows in registers, and torch's GEMM with the update after it.
SHAPES = [(1, 512, 384, 16), (16, 512, 384, 8), (70, 384, 256, 16), (300, 128, 264, 33)]
THREADS = 6


def _calls(seed, dtype):
    found = []
    for shape in SHAPES:
        case = make_linear(*shape, dtype, seed=seed)
        leaves = [tensor.clone().requires_grad_() for tensor in (case.x, case.lora_a, case.lora_b)]
        x, lora_a, lora_b = leaves
        options = {"dropout_p": 0.1, "dropout_seed": torch.tensor(seed)}
        y = ops.lora_linear(x, case.weight, case.bias, lora_a, lora_b, case.scaling, **options)
        found += [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]
        found.append(ops.lora_linear(*case.args()))
        found.append(ops.merge_(case.weight.clone(), case.lora_a, case.lora_b, case.scaling))
        several = make_multi(*shape, 4, dtype, seed=seed)
        plan = ops.plan_batch(several.token_slots, several.slot_ranks, num_slots=4)
        banks = (several.a_bank, several.b_bank, several.slot_scalings)
        found.append(ops.multi_lora_linear(several.x, several.weight, several.bias, *banks, plan))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_disturb_each_other(dtype):
    expected = [_calls(seed, dtype) for seed in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(3):
            for found, wanted in zip(pool.map(_calls, range(THREADS), [dtype] * THREADS), expected, strict=True):
                assert all(map(torch.equal, found, wanted))
