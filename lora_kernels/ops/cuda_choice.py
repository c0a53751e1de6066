"""Which of the CUDA, Triton and reference kernels runs an op on CUDA tensors.

One small function an op is registered on torch's CUDA key, and picks when it is called: so the choice is invisible
to ``torch.compile``. The C++ library registers its kernels as ``lora_kernels_cuda::name``, the same schema under a
namespace of its own. What no GPU has run is never picked unless it is asked for by name.
"""

import torch

from .. import _native
from . import cuda_backend, library, triton_backend

# Ops that ran on hardware and passed tests/gpu there, by backend. Nothing has yet.
PROVEN = {"cuda": frozenset(), "triton": frozenset()}
# Of two that could run, the first is taken.
PREFERENCE = ("cuda", "triton")
UNPROVEN = "compiled, not yet run on hardware; runs only when asked for by name"


class Refused(RuntimeError):
    """A backend that was set by name can not run a call."""


calls = {}  # (op name, backend, why not a faster one) -> how often


def choose(name, refusals, proven=None):
    """(backend, why not a faster one) for one call. Pure: the same arguments give the same answer.

    Args:
        name: the op.
        refusals: ``{backend: reason}``, None for a backend that can run this call with these shapes.
        proven: as :data:`PROVEN`.
    """
    proven, why = PROVEN if proven is None else proven, []
    for backend in PREFERENCE:
        reason = refusals[backend]
        if reason is None and name in proven[backend]:
            return backend, "; ".join(why)
        why.append(f"{backend}: {reason or UNPROVEN}")
    return "reference", "; ".join(why)


def refusal(backend, name, args):
    """Why ``"cuda"`` or ``"triton"`` can not run this call; None when it can."""
    if backend == "triton":
        return triton_backend.refusal(name, args)
    reason = _native.cuda_problem()
    if reason is None and not _native.load_cuda():
        reason = _native.cuda_reason
    if reason is None and not library.has_cuda_kernel(name):
        reason = "has no kernel for this op"
    if reason is None and args:
        first = args[0][0] if isinstance(args[0], list) else args[0]
        reason = triton_backend.device_problem(first.device.index)
    return reason or cuda_backend.refusal(name, args)


def refuse(backend, name, args):
    """Raises :class:`Refused` where a backend that was set by name can not run this call."""
    reason = refusal(backend, name, args)
    if reason is not None:
        raise Refused(f"{name}: backend {backend!r} can not run this call: {reason}")


def takes_lists(weight, forced):
    """Whether merging many weights in one call is better than one by one for weights on this device."""
    if not weight.is_cuda or (forced is None and "merge_list_" not in PROVEN["cuda"]):
        return False
    return forced in (None, "cuda") and refusal("cuda", "merge_list_", ([weight],)) is None


def run(backend, name, args):
    """Runs the op on one of the backends."""
    if backend == "cuda":
        return library.cuda_op(name)(*args)
    launcher = triton_backend.kernels()[name]
    # Triton launches on the current device, whichever GPU the tensors are on.
    if args[0].device.index == torch.cuda.current_device():
        return launcher(*args)
    with torch.cuda.device(args[0].device):
        return launcher(*args)


def register(reference, forced):
    """Registers the choosers.

    Args:
        reference: ``{op name: kernel}`` that always works.
        forced: function that returns the backend set by name, or None.
    """
    library.register_cuda({name: _chooser(name, kernel, forced) for name, kernel in reference.items()})


def _chooser(name, kernel, forced):
    def chosen(*args):
        backend = forced()
        if backend in PREFERENCE:
            refuse(backend, name, args)
            why = ""
        else:
            # What is not proven is not chosen: do not load it to ask what it would refuse.
            refusals = {b: refusal(b, name, args) if name in PROVEN[b] else UNPROVEN for b in PREFERENCE}
            backend, why = choose(name, refusals)
        calls[name, backend, why] = calls.get((name, backend, why), 0) + 1
        return kernel(*args) if backend == "reference" else run(backend, name, args)

    return chosen
