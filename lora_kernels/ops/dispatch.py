"""Which backend runs an op, and why.

``auto`` leaves the choice to torch's dispatcher: for CPU tensors the native kernel where one is registered, for
CUDA tensors what ``cuda_choice.py`` picks, the reference otherwise. A backend that is named is the one that runs, or
the call raises.
The choice is a plain module global, not a ContextVar: it must not break ``torch.compile(fullgraph=True)``.
"""

import contextlib
import functools
import os
from collections.abc import Iterator

import torch

from .. import _native
from . import cuda_choice, library, triton_backend
from .dora.reference import KERNELS as _dora_kernels
from .embedding.reference import KERNELS as _embedding_kernels
from .exact.reference import KERNELS as _exact_kernels
from .grouped.reference import KERNELS as _grouped_kernels
from .linear.reference import KERNELS as _linear_kernels
from .merge.reference import KERNELS as _merge_kernels
from .multi.reference import KERNELS as _multi_kernels

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
reference_calls = {}


def _counted(name, kernel):
    @functools.wraps(kernel)
    def counting(*args):
        reference_calls[name] = reference_calls.get(name, 0) + 1
        return kernel(*args)

    return counting


_kernels = {
    **_linear_kernels,
    **_multi_kernels,
    **_grouped_kernels,
    **_embedding_kernels,
    **_merge_kernels,
    **_dora_kernels,
    **_exact_kernels,
}
REFERENCE = {name: _counted(name, kernel) for name, kernel in _kernels.items()}
HANDLES = {name: library.op(name) for name in library.SCHEMAS}
_OPAQUE = {name: library.reference_op(name) for name in library.SCHEMAS}
library.register_reference(REFERENCE)
cuda_choice.register(REFERENCE, lambda: forced)
_native.load()

forced = None
forced_device = "cuda"  # where a backend that is named runs: plain values are what torch.compile traces best
batch_invariant = False
# Native CPU kernels refuse bad arguments themselves; before any other the arguments are checked in Python.
check_first = True


def unavailable(backend):
    """Why a backend can not run here; None when it can."""
    if backend in ("auto", "reference"):
        return None
    if backend == "cpu":
        return None if _native.cpu_available else _native.cpu_reason
    return _native.cuda_problem() if backend == "cuda" else triton_backend.problem()


def _named(backend, origin):
    if backend not in BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = unavailable(backend)
    if reason is not None:
        raise RuntimeError(f"{origin}: backend {backend!r} can not run here: {reason}")
    if backend == "cuda" and not _native.load_cuda():
        raise RuntimeError(f"{origin}: backend {backend!r} can not run here: {_native.cuda_reason}")
    return None if backend == "auto" else backend


@contextlib.contextmanager
def use_backend(backend: str = "auto", *, batch_invariant: bool | None = None) -> Iterator[None]:
    """Runs every op in the block on one backend.

    Args:
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``. A named backend never
            falls back: an op that it can not run raises ``RuntimeError`` with the reason.
        batch_invariant: when True, the bits of a row do not depend on which or how many other rows share
            the batch. Slower for large batches. None keeps the present setting.

    The setting holds for the process, not for the thread.
    """
    before = _set(_named(backend, "use_backend"), batch_invariant)
    try:
        yield
    finally:
        _set(*before)


def _set(backend, invariant):
    """Makes the setting; returns the one before."""
    global forced, forced_device, batch_invariant, check_first
    if backend == "cpu":
        for name in library.SCHEMAS:  # a compiler can not ask
            library.has_cpu_kernel(name)
    before = forced, batch_invariant
    forced = backend
    forced_device = "cpu" if backend == "cpu" or (backend == "triton" and triton_backend.interpreted()) else "cuda"
    batch_invariant = batch_invariant if invariant is None else bool(invariant)
    check_first = forced is not None or not library.has_cpu_kernel("lora_linear")
    return before


def select(name, tensor):
    """The callable that runs op ``name`` for ``tensor`` under the present setting; float64 is the reference's."""
    if forced is None:
        return _reference(name) if tensor.dtype is torch.float64 else HANDLES[name]
    return pick(name, tensor)


def _reference(name):
    """For a compiler as an op: the references count their calls and read what a plan holds."""
    return _OPAQUE[name] if torch.compiler.is_compiling() else REFERENCE[name]


def pick(name, tensor):
    """The callable of the forced backend (``forced`` is not None); it never falls back."""
    if forced == refused_backend:
        raise RuntimeError(refusal)
    if forced == "reference":
        return _reference(name)
    if tensor.dtype is torch.float64:
        raise RuntimeError(f"{name}: backend {forced!r} has no kernel for float64; the reference has")
    if tensor.device.type != forced_device:
        raise RuntimeError(f"{name}: backend {forced!r} runs on {forced_device} tensors, got one on {tensor.device}")
    if forced_device == "cuda":
        return HANDLES[name]  # cuda_choice.py refuses what the backend can not run
    if forced == "triton":
        return functools.partial(_interpret, name)
    if not library.has_cpu_kernel(name):
        raise RuntimeError(f"{name}: backend {forced!r} has no kernel for this op")
    return HANDLES[name]


def jit_traces():
    """Whether ``torch.jit.trace`` records: ops without gradients then, as it can not save functions that have some, and
    its own check, which runs without, has to find the same ops."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def _switch(variable):
    value = os.environ.get(variable) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{variable}: expected 0 or 1, got {value!r}")
    return value == "1"


def _interpret(name, *args):
    """A Triton kernel on CPU tensors, in Triton's interpreter."""
    reason = triton_backend.refusal(name, args)
    if reason is not None:
        raise RuntimeError(f"{name}: backend 'triton' can not run this call: {reason}")
    return triton_backend.kernels()[name](*args)


def _from_environment():
    """The settings that variables make. A backend that can not run here is kept: the first op raises, not the import,
    so that ``python -m lora_kernels env`` can say why."""
    global refused_backend, refusal
    backend = os.environ.get("LORA_KERNELS_BACKEND") or "auto"
    try:
        backend = _named(backend, "LORA_KERNELS_BACKEND")
    except RuntimeError as error:
        refused_backend, refusal = backend, str(error)
    _set(backend, _switch("LORA_KERNELS_BATCH_INVARIANT"))


refused_backend = refusal = None  # what LORA_KERNELS_BACKEND names and can not run here, and why not
_from_environment()
