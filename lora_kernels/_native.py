"""Loads the compiled op libraries, and remembers why one is missing. Importing never touches a GPU.

`load()` runs once, after ops/library.py has defined the schemas. The CUDA library waits until somebody asks for
it (`load_cuda()`), because asking torch whether there is a GPU is not free.
"""

import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

_FOLDER = Path(__file__).resolve().parent
ISA_LEVELS = ("portable", "avx2", "avx512", "avx512bf16", "amx")

cpu_available = False
cpu_reason = "not loaded yet"
cuda_available = False
cuda_reason = "not asked for yet"
module: ModuleType | None = None  # lora_kernels._C
module_reason = "not loaded yet"

_NOT_BUILT = "not built (`python -m lora_kernels env` says why)"
_loaded = False
_cuda_tried = False


def load() -> bool:
    """Loads _C and the CPU ops where they were built; true when the CPU ops can be called."""
    global _loaded, cpu_available, cpu_reason, module, module_reason
    if _loaded:
        return cpu_available
    wanted = os.environ.get("LORA_KERNELS_CPU_ISA") or ISA_LEVELS[-1]  # the C++ code reads it, and takes what it knows
    if wanted not in ISA_LEVELS:
        raise ValueError(f"LORA_KERNELS_CPU_ISA: expected one of {', '.join(ISA_LEVELS)}, got {wanted!r}")
    _loaded = True
    try:
        module = importlib.import_module("lora_kernels._C")
        module_reason = "loaded"
    except ImportError as error:
        module_reason = f"_C cannot be imported: {error}"
    cpu_available, cpu_reason = _load_library("_ops_cpu.so")
    return cpu_available


def cuda_problem() -> str | None:
    """Why the CUDA ops cannot be loaded here; None when they can. Loads nothing."""
    if not (_FOLDER / "_ops_cuda.so").is_file():
        return _NOT_BUILT
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA support"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def load_cuda() -> bool:
    """Loads the CUDA ops where they were built and there is a device; true when they can be called. ops/cuda_choice.py
    decides when they are."""
    global _cuda_tried, cuda_available, cuda_reason
    if _cuda_tried:
        return cuda_available
    _cuda_tried = True
    load()
    problem = cuda_problem()
    cuda_available, cuda_reason = (False, problem) if problem else _load_library("_ops_cuda.so")
    return cuda_available


def _load_library(name: str) -> tuple[bool, str]:
    path = _FOLDER / name
    if not path.is_file():
        return False, _NOT_BUILT
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return False, f"{name} cannot be loaded under torch {torch.__version__}: {error}"
    return True, "loaded"
