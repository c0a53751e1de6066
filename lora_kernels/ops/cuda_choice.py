"""Which of the CUDA, Triton and reference kernels runs an op on CUDA tensors.

One small function an op is registered on torch's CUDA key, and picks when it is called: so the choice is invisible
to ``torch.compile``. The C++ library registers its kernels as ``lora_kernels_cuda::name``, the same schema under a
namespace of its own. What no run on a GPU has shown right is never picked unless it is asked for by name.
"""

import functools
import warnings

import torch

from .. import _native
from . import cuda_backend, library, proof, triton_backend

# Ops that passed tests/gpu, by backend, as a file in bench/results shows: proven on every GPU. Nothing is yet.
PROVEN = {"cuda": frozenset(), "triton": frozenset()}
# Of two that could run, the first is taken.
PREFERENCE = ("cuda", "triton")
UNPROVEN = f"compiled, not yet run on hardware: only when asked for by name, or once `{proof.HOW}` passed on this GPU"


class Refused(RuntimeError):
    """A backend that was set by name can not run a call."""


calls = {}  # (op name, backend, why not a faster one) -> how often


def proven(backend, name, index):
    """Whether ``auto`` may take this backend for an op on the GPU with this index: by :data:`PROVEN`, or by the proof
    that :mod:`.proof` reads on this machine."""
    return name in PROVEN[backend] or name in proof.of_device(index)[backend]


def proven_here(backend):
    """The ops of which :func:`proven` is true on the current GPU; on a machine without one, those of :data:`PROVEN`."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return PROVEN[backend]
    return PROVEN[backend] | proof.of_device(torch.cuda.current_device())[backend]


def choose(refusals):
    """(backend, why not a faster one) for one call. Pure: the same arguments give the same answer.

    Args:
        refusals: ``{backend: reason}``, None for a backend that can run this call and is proven to.
    """
    why = []
    for backend in PREFERENCE:
        if refusals[backend] is None:
            return backend, "; ".join(why)
        why.append(f"{backend}: {refusals[backend]}")
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
        reason = triton_backend.device_problem(_index(args))
    return reason or cuda_backend.refusal(name, args)


def _index(args):
    first = args[0][0] if isinstance(args[0], list) else args[0]
    return first.device.index


def refuse(backend, name, args):
    """Raises :class:`Refused` where a backend that was set by name can not run this call."""
    reason = refusal(backend, name, args)
    if reason is not None:
        raise Refused(f"{name}: backend {backend!r} can not run this call: {reason}")


def takes_lists(weight, forced):
    """Whether merging many weights in one call is better than one by one for weights on this device."""
    if not weight.is_cuda or (forced is None and not proven("cuda", "merge_list_", weight.device.index)):
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


@functools.cache
def _hint(index):
    """Says once a GPU what would make it faster."""
    if any(proof.of_device(index).values()):
        return  # checked: what is still not proven did not pass, or has no kernel
    warnings.warn(
        f"{torch.cuda.get_device_name(index)}: LoRA runs on plain torch, as the fused kernels were not yet checked on "
        f"this GPU; `{proof.HOW}` does so once",
        stacklevel=2,
    )


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
            index = _index(args)
            refusals = {b: refusal(b, name, args) if proven(b, name, index) else UNPROVEN for b in PREFERENCE}
            backend, why = choose(refusals)
            if UNPROVEN in refusals.values():
                _hint(index)
        calls[name, backend, why] = calls.get((name, backend, why), 0) + 1
        return kernel(*args) if backend == "reference" else run(backend, name, args)

    return chosen
