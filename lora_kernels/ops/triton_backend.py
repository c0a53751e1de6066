"""The Triton backend as dispatch sees it: can it run here, which ops has it, and what does it refuse.

A family's ``triton.py`` holds ``KERNELS`` ({op name: launcher with the op's signature}); it may hold ``REFUSED``
({op name: function of the op's arguments that returns a reason, or None}) and ``STATIC_CASES`` (a function that lists
the :class:`~lora_kernels.ops.triton_host.StaticCase` of its kernels). Triton itself is imported by the first call that
needs it.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys

import torch

MODULES = (
    "linear.triton",
    "linear.triton_train",
    "multi.triton",
    "multi.triton_train",
    "grouped.triton",
    "embedding.triton",
    "merge.triton",
    "dora.triton",
)
OLDEST = (3, 6)
OLDEST_INTERPRETER = (3, 7, 1)  # the first one that runs with numpy 2.4 and newer
OLDEST_CAPABILITY = (8, 0)


def interpreted():
    """Whether the kernels are, or would be, run by Triton's interpreter on CPU tensors (TRITON_INTERPRET=1)."""
    host = sys.modules.get(f"{__package__}.triton_host")
    return host.INTERPRETED if host else os.environ.get("TRITON_INTERPRET") == "1"


def _version(package):
    """As text, and as numbers."""
    try:
        text = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        text = importlib.import_module(package).__version__
    return text, tuple(int(part) for part in re.findall(r"\d+", text)[:3])


@functools.cache
def _package_problem():
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # none, or a mere folder of that name
        return "triton is not installed (pip install 'triton>=3.6')"
    version, found = _version("triton")
    if found < OLDEST:
        return f"triton {version} is too old, {'.'.join(map(str, OLDEST))} or newer is needed"
    return None


@functools.cache
def _interpreter_problem():
    (version, found), (numpy, of_numpy) = _version("triton"), _version("numpy")
    if found < OLDEST_INTERPRETER and of_numpy >= (2, 4):
        return f"the interpreter of triton {version} fails with numpy {numpy}: numpy<2.4 or triton>=3.7.1 is needed"
    return None


def problem():
    """Why the Triton kernels can not run here; None when they can. Imports nothing."""
    reason = _package_problem()
    if reason or interpreted():
        return reason or _interpreter_problem()
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA support"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return device_problem(torch.cuda.current_device())


@functools.cache
def device_problem(index):
    """Why the GPU with this index is not good enough; None when it is."""
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, 8.0 or newer is needed"
    return None


@functools.cache
def modules():
    """The modules of kernels; imports Triton."""
    return tuple(importlib.import_module(f"{__package__}.{name}") for name in MODULES)


@functools.cache
def kernels():
    """{op name: launcher} over all families; imports Triton."""
    return {name: kernel for module in modules() for name, kernel in module.KERNELS.items()}


@functools.cache
def _refused():
    return {name: check for module in modules() for name, check in getattr(module, "REFUSED", {}).items()}


def refusal(name, args):
    """Why the Triton backend can not run this call, or, without arguments, the op at all; None when it can."""
    if args and getattr(args[0], "is_cuda", False):
        reason = _package_problem() or device_problem(args[0].device.index)
    else:
        reason = problem()
    if reason is None and name not in kernels():
        reason = "has no kernel for this op"
    if reason is None and args and name in _refused():
        reason = _refused()[name](*args)
    return reason
