"""Finds the tools and headers of a native build, without importing torch."""

import os
import re
import shutil
import site
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Torch:
    """A torch installation: its version as torch.__version__ gives it, and its package folder."""

    version: str
    root: Path


def _site_folders() -> list[Path]:
    """Folders that may hold torch, the best first.

    Inside pip's build isolation sys.path shows only the build requirements, but the interpreter is still the
    target's own, so sysconfig names the folder pip installs into. Other front ends build in a new virtual
    environment; VIRTUAL_ENV, CONDA_PREFIX and the base interpreter then lead back to the caller's.
    """
    folders = [Path(p) for p in sys.path if p]
    folders += [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]
    folders += [Path(p) for p in (*site.getsitepackages(), site.getusersitepackages())]
    for prefix in (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), sys.base_prefix):
        if prefix:
            folders.append(Path(sysconfig.get_path("purelib", vars={"base": prefix, "platbase": prefix})))
    return list(dict.fromkeys(folders))


def find_torch() -> Torch | None:
    """The torch whose headers the ops are built with; LORA_KERNELS_TORCH_DIR names one outright."""
    explicit = os.environ.get("LORA_KERNELS_TORCH_DIR")
    roots = [Path(explicit)] if explicit else [folder / "torch" for folder in _site_folders()]
    for root in roots:
        version_file = root / "version.py"
        if version_file.is_file() and (root / "include" / "torch" / "csrc" / "stable").is_dir():
            match = re.search(r"^__version__ = '([^']+)'", version_file.read_text(), re.M)
            if match:
                return Torch(match.group(1), root)
    return None


def torch_is_recent(torch: Torch) -> bool:
    """Whether its stable ABI has everything the ops use (2.10)."""
    major, minor = re.match(r"(\d+)\.(\d+)", torch.version).groups()
    return (int(major), int(minor)) >= (2, 10)


def find_tool(name: str) -> str | None:
    """A build tool: from a PyPI package of that name (as build requirements bring it), else from PATH."""
    try:
        module = __import__(name)
        folder = getattr(module, f"{name.upper()}_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
    except ImportError:
        folder = None
    for path in (folder, sysconfig.get_path("scripts")):
        found = path and shutil.which(name, path=str(path))
        if found:
            return found
    return shutil.which(name)


def find_cxx() -> str | None:
    """The C++ compiler: $CXX where set (and then no other), else the first known name on PATH."""
    if os.environ.get("CXX"):
        return shutil.which(os.environ["CXX"].split()[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_nvcc() -> str | None:
    """nvcc from $CUDACXX, $CUDA_HOME, PATH or the usual place."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        found = home and shutil.which("nvcc", path=str(Path(home) / "bin"))
        if found:
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_pybind11() -> Path | None:
    """pybind11's include folder."""
    try:
        import pybind11
    except ImportError:
        return None
    return Path(pybind11.get_include())


def find_python_include() -> Path | None:
    """The folder of Python.h, or None where the interpreter came without headers."""
    folder = Path(sysconfig.get_path("include"))
    return folder if (folder / "Python.h").is_file() else None
