"""Helpers: a small copy of the checkout to build, bare environments to install into; no network anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(torch.__file__).resolve().parents[1]
# Enough of the C++ for every kind of source file; the machinery is under test here, not the kernels.
SOURCES = ("cpu/isa.cpp", "cpu/dropout.cpp", "cpu/dropout_isa.cpp", "bind/module.cpp", "bind/ops_info.cpp", "include")
OFFLINE = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")


def run(*command, cwd, ok=True, **variables) -> str:
    """Output of a command; its exit code must be zero exactly when `ok`. Build settings of ours do not leak in."""
    dropped = ("CC", "CXX", "PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS")
    env = {k: v for k, v in os.environ.items() if not k.startswith("LORA_KERNELS_") and k not in dropped}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode == 0) == ok, f"{command} gave {done.returncode}:\n{done.stdout}"
    return done.stdout


def copy_checkout(target: Path) -> Path:
    target.mkdir()
    (target / "README.md").write_text("A copy to build.\n")
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("cmake", "build_support", "lora_kernels"):
        unwanted = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(ROOT / name, target / name, ignore=unwanted)
    for name in SOURCES:
        source, copy = ROOT / "csrc" / name, target / "csrc" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    return target


def build_in_place(checkout: Path, ok=True, **variables) -> str:
    return run(sys.executable, "-m", "build_support", cwd=checkout, ok=ok, **variables)


class Environment:
    """A virtual environment without pip that sees this one's packages, though not its lora_kernels."""

    def __init__(self, folder: Path):
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.python = folder / "bin" / "python"
        site = self.python_says("import sysconfig; print(sysconfig.get_path('purelib'))")
        self.site = Path(site)
        (self.site / "parent.pth").write_text(f"{SITE}\n")

    def pip(self, *command, cwd, ok=True, **variables) -> str:
        # The tools beside this Python come first on PATH, as in an environment that had them installed.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = (sys.executable, "-m", "pip", "--python", self.python, *command)
        return run(*command, cwd=cwd, ok=ok, PATH=path, **variables)

    def python_says(self, code: str) -> str:
        return run(self.python, "-c", code, cwd="/").strip().rpartition("\n")[2]


def names_in(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())
