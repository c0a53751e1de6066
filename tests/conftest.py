"""Shared by all tests: one seed, and the backends that can run here."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops import dispatch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Runs the test once a backend, forced: nothing falls back in silence."""
    reason = dispatch.unavailable(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with lk.use_backend(request.param):
        yield request.param
