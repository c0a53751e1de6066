"""Shared by all tests: one seed, the backends that can run here, and Triton's interpreter where there is no GPU."""

import importlib.util
import os
import sys

import pytest
import torch


def _define_triton_kernels_for_the_interpreter():
    """Triton decides when it and a kernel are imported whether the kernel will be compiled or interpreted. Other
    processes that the tests start do not inherit the choice."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        knobs = importlib.import_module("triton").knobs
        importlib.import_module("lora_kernels.ops.triton_backend").kernels()
        knobs.propagate_env, knobs.runtime.interpret = False, True
        knobs.propagate_env = True
    finally:
        del os.environ["TRITON_INTERPRET"]


if importlib.util.find_spec("triton") is None:
    collect_ignore = ["triton_kernels"]
elif "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    _define_triton_kernels_for_the_interpreter()

from lost_gpu import pytest_runtest_makereport  # noqa: E402, F401

if "LORA_KERNELS_PASSED" in os.environ:
    from resumed import (  # noqa: F401
        pytest_collection_modifyitems,
        pytest_runtest_logreport,
        pytest_sessionfinish,
    )

import lora_kernels as lk  # noqa: E402
from lora_kernels import _native  # noqa: E402
from lora_kernels.ops import dispatch  # noqa: E402

ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_compile_cache():
    """torch counts recompilations by function: those of one test must not use up the limit of the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Runs the test once a backend, forced: nothing falls back in silence."""
    reason = dispatch.unavailable(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with lk.use_backend(request.param):
        yield request.param


@pytest.fixture(params=ISAS)
def isa_environment(request):
    """Once a level of the CPU kernels, skipping those this CPU lacks: the environment of a process that runs it."""
    if not _native.cpu_available or _native.module is None:
        pytest.skip(_native.cpu_reason if not _native.cpu_available else _native.module_reason)
    best = _native.module.host_isa()
    if ISAS.index(request.param) > ISAS.index(best):
        pytest.skip(f"this CPU runs kernels up to {best}; `make avx512` emulates the others")
    return {**os.environ, "LORA_KERNELS_CPU_ISA": request.param}


@pytest.fixture(scope="module")
def one_rank():
    """torch.distributed with this process alone."""
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
