"""The Triton backend in dispatch: reasons, refusals, and the choice on CUDA tensors."""

import importlib.machinery

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops import cuda_choice, dispatch, library, proof, triton_backend
from lora_kernels.testing import make_linear


def test_reasons_why_it_can_not_run(monkeypatch):
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    triton_backend.device_problem.cache_clear()
    assert "Tesla T4 has compute capability 7.5, 8.0 or newer" in triton_backend.problem()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    triton_backend.device_problem.cache_clear()
    assert triton_backend.problem() is None
    triton_backend.device_problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_backend.problem() == "torch finds no CUDA device"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA support" in triton_backend.problem()


@pytest.mark.parametrize(("version", "reason"), [("3.5.1", "too old, 3.6 or newer"), ("3.6.0", None), ("3.10.0", None)])
def test_versions(version, reason, monkeypatch):
    triton_backend._package_problem.cache_clear()
    monkeypatch.setattr(triton_backend.importlib.metadata, "version", lambda package: version)
    found = triton_backend._package_problem()
    monkeypatch.undo()
    triton_backend._package_problem.cache_clear()
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("found", [None, importlib.machinery.ModuleSpec("triton", None)], ids=["none", "a folder"])
def test_without_the_package(found, monkeypatch):
    triton_backend._package_problem.cache_clear()
    monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda name: found)
    reason = dispatch.unavailable("triton")
    with pytest.raises(RuntimeError, match="backend 'triton' can not run here: triton is not installed"):
        lk.use_backend("triton").__enter__()
    monkeypatch.undo()
    triton_backend._package_problem.cache_clear()
    assert reason.startswith("triton is not installed")


def test_a_call_that_it_can_not_run_is_refused_by_name(monkeypatch, device):
    case = make_linear(3, 16, 8, 2, device=device)
    monkeypatch.setattr(triton_backend, "_refused", lambda: {"lora_linear": lambda *args: "not on a Tuesday"})
    with pytest.raises(RuntimeError, match="lora_linear: backend 'triton' can not run this call: not on a Tuesday"):
        lk.ops.lora_linear(*case.args())
    monkeypatch.setattr(triton_backend, "kernels", dict)
    with pytest.raises(RuntimeError, match="has no kernel for this op"):
        lk.ops.lora_linear(*case.args())


def test_the_choice_between_backends():
    unproven = cuda_choice.UNPROVEN
    assert cuda_choice.choose({"cuda": unproven, "triton": unproven})[0] == "reference"
    assert cuda_choice.choose({"cuda": unproven, "triton": None}) == ("triton", f"cuda: {unproven}")
    assert cuda_choice.choose({"cuda": None, "triton": None}) == ("cuda", "")
    assert cuda_choice.choose({"cuda": "rank 9 is odd", "triton": None}) == ("triton", "cuda: rank 9 is odd")


class _OnGpu:
    """Stands for a tensor on the first GPU."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize("forced", [None, "reference", "triton", "cuda"])
def test_the_function_on_the_cuda_key(forced, monkeypatch):
    """What runs on CUDA tensors, with stand-ins for the backends: the chosen one and no other, or a refusal."""
    monkeypatch.setattr(cuda_choice, "calls", {})
    monkeypatch.setattr(cuda_choice, "run", lambda backend, name, args: backend)
    monkeypatch.setattr(proof, "of_device", lambda index: {"cuda": frozenset(), "triton": frozenset({"merge_"})})
    refusals = {"triton": None, "cuda": "not built (no nvcc at build time)"}
    monkeypatch.setattr(cuda_choice, "refusal", lambda backend, name, args: refusals[backend])
    chosen = cuda_choice._chooser("lora_linear", lambda *args: "reference", lambda: forced)
    if forced == "cuda":
        with pytest.raises(RuntimeError, match=r"lora_linear: backend 'cuda' can not run this call: not built"):
            chosen(_OnGpu())
        return
    assert chosen(_OnGpu()) == ("triton" if forced == "triton" else "reference")
    assert "cuda tensors, lora_linear: " in lk.explain()
    if forced is None:
        assert "not yet run on hardware" in lk.explain()


_TOO_OLD = (
    "Tesla T4 has compute capability 7.5, 8.0 or newer is needed",
    "triton 3.5.1 is too old, 3.6 or newer is needed",
    "triton is not installed (pip install 'triton>=3.6')",
    "weight is torch.float64; the kernel takes float32, float16 and bfloat16",
)


@pytest.mark.parametrize("reason", _TOO_OLD)
def test_auto_takes_another_path_and_explain_says_which_and_why(reason, monkeypatch):
    """Of an op that a GPU has proven; the reasons are those of a GPU, of a package and of a call."""
    monkeypatch.setattr(cuda_choice, "calls", {})
    monkeypatch.setattr(proof, "of_device", lambda index: {"cuda": frozenset(), "triton": frozenset({"lora_linear"})})
    monkeypatch.setattr(cuda_choice, "refusal", lambda backend, name, args: reason)
    monkeypatch.setattr(triton_backend, "problem", lambda: reason)
    chosen = cuda_choice._chooser("lora_linear", lambda *args: "reference", lambda: None)
    assert chosen(_OnGpu()) == "reference"
    text = lk.explain()
    assert f"triton: can not run: {reason}" in text
    assert "cuda tensors, lora_linear: reference ran 1 calls (" in text
    assert f"triton: {reason})" in text
    with pytest.raises(RuntimeError, match="backend 'triton' can not run here: ") as error:
        lk.use_backend("triton").__enter__()
    assert reason in str(error.value)


def test_a_launch_is_made_on_the_device_of_the_tensors(monkeypatch):
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device.index)

        def __exit__(self, *error):
            entered.append("left")

    class Tensor:
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(triton_backend, "kernels", lambda: {"lora_linear": lambda x: list(entered)})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert cuda_choice.run("triton", "lora_linear", (Tensor(),)) == []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert cuda_choice.run("triton", "lora_linear", (Tensor(),)) == [1]
    assert entered == [1, "left"]


def test_two_launches_are_linked_only_where_the_gpu_can():
    host = pytest.importorskip("lora_kernels.ops.triton_host")
    for capability, linked in (((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)):
        with host.pretend(capability):
            assert host.has_pdl(torch.empty(0)) is linked


def test_what_is_read_16_bytes_at_a_time_and_what_tma_takes():
    """Triton knows of a stride no more than whether it is a multiple of 16; a tensor map has no rows that overlap."""
    host = pytest.importorskip("lora_kernels.ops.triton_host")

    def both(tensor):
        return host.aligned(tensor), host.tma_ready(tensor)

    plain = torch.empty((8, 64), dtype=torch.bfloat16)
    assert both(plain) == both(plain[:, :48]) == (True, True)
    assert both(plain.t()) == (True, False)
    assert both(torch.empty((8, 1000), dtype=torch.bfloat16)) == (False, True)
    assert both(torch.empty((8, 1001), dtype=torch.bfloat16)) == (False, False)
    assert both(plain[:, 1:]) == both(plain[:1].expand(8, 64)) == both(plain[:, ::2]) == (False, False)


def test_every_op_has_the_function_on_the_cuda_key():
    for name in library.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lora_kernels::{name}", "CUDA"), name


def test_static_cases_are_named_once():
    names = [case.name for module in triton_backend.modules() for case in getattr(module, "STATIC_CASES", list)()]
    assert len(names) == len(set(names))
