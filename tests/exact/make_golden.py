"""Writes tests/exact/golden/*.safetensors with the reference backend: inputs, merged bits, residual.

Run once a format version: `python tests/exact/make_golden.py`. Existing files are the contract; do not remake them.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

import lora_kernels as lk

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def _wild(shape, dtype, generator):
    """Every magnitude of the dtype up to a quarter of its range, with zeros of both signs and subnormals."""
    low, high = (-150, 120) if dtype is not torch.float16 else (-26, 14)
    exponents = torch.randint(low, high, shape, generator=generator).double()
    values = (torch.randn(shape, generator=generator).double().clamp(-2, 2) * exponents.exp2()).to(dtype)
    kind = torch.randint(0, 16, shape, generator=generator)
    values[kind == 0] = 0.0
    values[kind == 1] = -0.0
    return values


def cases():
    """``name -> (weight, lora_a, lora_b, scaling)``."""
    made = {}
    for name, dtype in DTYPES.items():
        g = torch.Generator().manual_seed(20 + len(made))
        weight = (torch.randn(7, 300, generator=g) * 0.02).to(dtype)
        a, b = torch.randn(5, 300, generator=g), torch.randn(7, 5, generator=g) * 0.002
        made[f"usual-{name}"] = weight, a.to(dtype), b, 0.73
        made[f"swamped-{name}"] = weight, a, b * 1e3, 2.0
        tiny, few = _wild((3, 700), dtype, g), torch.randn(2, 700, generator=g)
        b = torch.tensor([[1e-3, 1e-8], [3e-25, 1e-38], [0.0, -1e-45]])
        made[f"wild-{name}"] = tiny, few, b, 1.0
        ties = (torch.randint(-64, 64, (2, 2100), generator=g) / 16).to(dtype)
        steps = torch.randint(-8, 8, (1, 2100), generator=g) / 2**12
        made[f"ties-{name}"] = ties, steps, torch.tensor([[1.0], [-0.5]]), 1.0
    return made


def main():
    GOLDEN.mkdir(exist_ok=True)
    for name, (weight, lora_a, lora_b, scaling) in cases().items():
        merged = weight.clone()
        with lk.use_backend("reference"):
            residual = lk.ops.merge_exact_(merged, lora_a, lora_b, scaling)
        tensors = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b, "scaling": torch.tensor(scaling)}
        save_file({**tensors, "merged": merged, **residual.to_tensors()}, str(GOLDEN / f"{name}.safetensors"))


if __name__ == "__main__":
    main()
