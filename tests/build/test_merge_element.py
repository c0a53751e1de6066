"""The arithmetic of the CUDA merge kernels, compiled for the host: one element of W + Σ scale · B A, and the check."""

import ctypes
import subprocess

import numpy as np
import pytest
import torch
from build_helpers import ROOT

from build_support import toolchain
from lora_kernels.testing import assert_within_budget

SOURCE = """
#include "lora_kernels/merge_element.h"
using namespace lora_kernels;
extern "C" {
void finite16(unsigned char* f16, unsigned char* bf16) {
  for (uint32_t i = 0; i < 65536; ++i) {
    f16[i] = finite_f16(static_cast<uint16_t>(i));
    bf16[i] = finite_bf16(static_cast<uint16_t>(i));
  }
}
int finite32(uint32_t bits) { return finite_f32(bits); }
// As the kernels go through it: w (n, k), a (r, k), b (n, r), float32; scales (r), one a step.
void merge(float* w, const float* a, const float* b, const float* scales, int n, int k, int r) {
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < k; ++j) {
      float sum = 0.f;
      for (int s = 0; s < r; ++s) sum = merge_step(sum, merge_factor(b[i * r + s], scales[s]), a[s * k + j]);
      w[i * k + j] = merge_apply(w[i * k + j], sum);
    }
  }
}
}
"""


@pytest.fixture(scope="module")
def element(tmp_path_factory):
    compiler = toolchain.find_cxx()
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("element")
    (folder / "element.cpp").write_text(SOURCE)
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", f"-I{ROOT / 'csrc' / 'include'}"]
    subprocess.run([compiler, *options, folder / "element.cpp", "-o", folder / "element.so"], check=True)
    return ctypes.CDLL(str(folder / "element.so"))


def _pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def test_finite_agrees_with_torch_on_all_16_bit_patterns(element):
    half, bfloat = (torch.empty(65536, dtype=torch.bool) for _ in range(2))
    element.finite16(_pointer(half), _pointer(bfloat))
    bits = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16))
    assert torch.equal(half, bits.view(torch.float16).isfinite())
    assert torch.equal(bfloat, bits.view(torch.bfloat16).isfinite())


def test_finite_agrees_with_torch_on_float32(element):
    edges = [0, 1, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    patterns = edges + [bits | 0x80000000 for bits in edges]
    patterns += np.random.default_rng(0).integers(0, 2**32, 500).tolist()
    for bits in patterns:
        value = torch.from_numpy(np.array([bits], np.uint32).view(np.float32))
        assert bool(element.finite32(ctypes.c_uint32(bits))) == bool(value.isfinite()), hex(bits)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 19), (64, 130, 256)])
@pytest.mark.parametrize("signs", [(1.0,), (-1.0,), (-1.0, 1.0)], ids=["merge", "unmerge", "switch"])
def test_an_element_is_within_the_error_budget(element, shape, signs):
    n, k, r = shape
    generator = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    weight, terms = draw(n, k), [(draw(r, k), draw(n, r), sign * (0.3 + i)) for i, sign in enumerate(signs)]
    eager, exact = weight.clone(), weight.double()
    for a, b, scale in terms:
        eager = eager + scale * (b @ a)
        exact = exact + torch.tensor(scale).double() * (b.double() @ a.double())
    a = torch.cat([term[0] for term in terms]).contiguous()
    b = torch.cat([term[1] for term in terms], 1).contiguous()
    scales = torch.tensor([term[2] for term in terms for _ in range(r)])
    element.merge(*map(_pointer, (weight, a, b, scales)), n, k, r * len(terms))
    assert_within_budget(weight, eager, exact, f"{len(signs)} terms, {shape}")
