"""Tests of the Triton backend: in Triton's interpreter on CPU tensors, or on the GPU where there is one."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops import dispatch, triton_backend


@pytest.fixture
def device():
    """Where the tensors of a test live."""
    return "cpu" if triton_backend.interpreted() else "cuda"


@pytest.fixture(autouse=True)
def on_triton():
    """Runs the test on the Triton backend, forced: nothing falls back in silence. Memory that an op allocates, results
    and workspaces alike, starts as NaN."""
    reason = dispatch.unavailable("triton")
    if reason is not None:
        pytest.skip(f"backend triton: {reason}")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with lk.use_backend("triton"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
