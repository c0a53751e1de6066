"""Shared by the tests of the exact merge: bits, layouts, random values of every magnitude, and a check to run
in another process under another instruction set."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import lora_kernels as lk

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int32 if tensor.dtype == F32 else torch.int16)


def same_bits(left, right):
    return left.dtype == right.dtype and torch.equal(bits(left), bits(right))


def values(shape, dtype, kind, generator):
    """`kind`: a standard deviation, or "wild" (all exponents, zeros, subnormals), "steps" (ties), "zeros"."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "wild":
        low, high = (-26, 12) if dtype == F16 else (-150, 100)
        x = x.clamp(-4, 4) * torch.randint(low, high, shape, generator=generator).double().exp2()
    elif kind == "steps":
        x = (x * 8).round() / 16
    elif kind == "zeros":
        x = x * (torch.rand(shape, generator=generator) < 0.3)
    else:
        x = x * kind
    return x.to(dtype)


def problem(n, k, rank, dtype, adapter_dtype=F32, w=0.02, a=0.25, b=0.001, seed=0):
    g = torch.Generator().manual_seed(seed)
    factors = values((rank, k), adapter_dtype, a, g), values((n, rank), adapter_dtype, b, g)
    return values((n, k), dtype, w, g), *factors, 0.73


def check_golden():
    for path in GOLDEN:
        case = load_file(path)
        merged = case["weight"].clone()
        adapter = case["lora_a"], case["lora_b"], case["scaling"]
        residual = lk.ops.merge_exact_(merged, *adapter)
        assert same_bits(merged, case["merged"]), path.name
        for name, value in residual.to_tensors().items():
            assert torch.equal(value, case[name]), (path.name, name)
        lk.ops.unmerge_exact_(merged, *adapter, lk.ops.MergeResidual.from_tensors(case))
        assert same_bits(merged, case["weight"]), path.name


if __name__ == "__main__":
    if "flush" in sys.argv:
        assert torch.set_flush_denormal(True)
    torch.set_num_threads(int(sys.argv[1]))
    with lk.use_backend(sys.argv[2]):
        check_golden()
