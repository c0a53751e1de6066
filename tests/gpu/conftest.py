"""Tests that need a GPU: every op on each GPU backend, at real sizes. Skipped, with the reason, where there is none."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops import cuda_choice, dispatch, triton_backend


def pytest_collection_modifyitems(items):
    for item in items:
        if "/gpu/" in item.nodeid or item.nodeid.startswith("gpu/"):
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """What a backend refuses by name is not tested there, and the report says so."""
    try:
        return (yield)
    except cuda_choice.Refused as refusal:
        pytest.skip(str(refusal))


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request):
    """Runs the test once a GPU backend, forced: nothing falls back in silence."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    if request.param == "triton" and triton_backend.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    reason = dispatch.unavailable(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with lk.use_backend(request.param):
        yield request.param


@pytest.fixture
def triton_on_a_gpu():
    """Runs the test on Triton, forced and compiled."""
    reason = "TRITON_INTERPRET is set" if triton_backend.interpreted() else dispatch.unavailable("triton")
    if reason is not None:
        pytest.skip(f"backend triton: {reason}")
    with lk.use_backend("triton"):
        yield


@pytest.fixture
def needs(gpu_backend):
    """``needs("merge_", …)`` skips where the backend has no kernel for one of the ops."""

    def check(*names):
        for name in names:
            if gpu_backend == "triton":
                there = name in triton_backend.kernels()
            else:
                there = cuda_choice.refusal("cuda", name, ()) is None
            if not there:
                pytest.skip(f"backend {gpu_backend} has no kernel for {name}")

    return check
