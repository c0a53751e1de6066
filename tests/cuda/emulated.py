"""Builds the CUDA ops for the host: the kernels' own source, launchers and bindings, run by csrc/emulate.

The library registers the kernels of ``lora_kernels_cuda`` for CPU tensors, so that a test calls
``library.cuda_op(name)`` as the CUDA backend would. Kept under build/, by what it was made of.
"""

import ctypes
import fcntl
import functools
import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from build_support import toolchain

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
OPTIONS = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fPIC", "-DLK_EMULATE"]
OPTIONS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
OPTIONS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]


def unavailable():
    """Why the library can not be built here; None when it can."""
    if toolchain.find_cxx() is None:
        return "no C++ compiler"
    return None if toolchain.find_torch() else "no torch headers"


def _sources():
    return [
        *sorted(CSRC.glob("cuda/*.cu")),
        *sorted(CSRC.glob("bind/ops_cuda_*.cpp")),
        *sorted(CSRC.glob("emulate/exports*.cpp")),
    ]


def _key(compiler):
    names = [path.name for path in _sources()]
    digest = hashlib.sha256(f"{compiler} {OPTIONS} {names} {torch.__version__}".encode())
    for path in sorted(path for path in CSRC.rglob("*") if path.is_file() and "cpu/" not in str(path)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def load():
    """The library, built where need be and loaded: a ``ctypes.CDLL``."""
    compiler, found = toolchain.find_cxx(), toolchain.find_torch()
    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{_key(compiler)}.so"
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_file():
            _build(compiler, found.root, folder, made)
    torch.ops.load_library(str(made))
    return ctypes.CDLL(str(made))


def _build(compiler, torch_root, folder, made):
    for old in folder.glob("*.so"):
        old.unlink()
    includes = [f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}", "-isystem", str(torch_root / "include")]

    def compiled(source):
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *OPTIONS, *includes, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, _sources()))
    fresh = folder / "fresh.so"
    subprocess.run([compiler, "-shared", *objects, torch_root / "lib" / "libtorch_cpu.so", "-o", fresh], check=True)
    fresh.replace(made)
