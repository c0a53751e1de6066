"""One CMake + ninja build of every shared object, in a folder keyed by Python and torch version."""

import fcntl
import filecmp
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from build_support import toolchain

OBJECTS = ("_C", "_ops_cpu", "_ops_cuda")
EMULATE_AVX512 = "LORA_KERNELS_EMULATE_AVX512"  # 1: the AVX-512 levels run on AVX2, for tests
MODES = ("auto", "cpu", "cuda", "none")


@dataclass
class Result:
    """What came out of a build: the objects by name, and why the others are missing."""

    objects: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    torch: str | None = None
    tools: dict[str, str] = field(default_factory=dict)

    def report(self) -> dict:
        return {
            "objects": sorted(self.objects),
            "notes": self.notes,
            "torch": self.torch,
            "tools": self.tools,
        }


def build(root: Path) -> Result:
    """Builds what LORA_KERNELS_BUILD and the tools at hand allow. Missing tools leave a note; sources that do
    not compile raise, except the CUDA ones under `auto`."""
    mode = os.environ.get("LORA_KERNELS_BUILD", "auto").lower()
    if mode not in MODES:
        raise SystemExit(f"LORA_KERNELS_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    result = Result()
    if mode == "none":
        result.notes.append("no native code was asked for (LORA_KERNELS_BUILD=none): reference backend only")
        return result
    found = _settings(result, mode)
    if found is None:
        return _required(result, mode)
    folder = root / "build" / (_key(result.torch) + ("-emulated-avx512" if found["LK_EMULATE_AVX512"] else ""))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one checkout take turns
        _build_in(root, folder, found, result, mode)
    return _required(result, mode)


def file_name(name: str) -> str:
    """_C is imported and named after this Python; the op libraries are loaded by torch and serve any Python."""
    return name + (sysconfig.get_config_var("EXT_SUFFIX") if name == "_C" else ".so")


def place(result: Result, package: Path) -> None:
    """Copies the objects into a package folder, with the report that lora_kernels.env reads, and removes what an
    earlier build left there and this one did not make."""
    package.mkdir(parents=True, exist_ok=True)
    for name in OBJECTS:
        target = package / file_name(name)
        made = result.objects.get(name)
        if made is None:
            target.unlink(missing_ok=True)
        elif not (target.is_file() and filecmp.cmp(made, target, shallow=False)):
            # Replaced, not overwritten: a process that has the old one loaded keeps it whole.
            fresh = f"{target}.{os.getpid()}"
            shutil.copy2(made, fresh)
            os.replace(fresh, target)
    (package / "_build.json").write_text(json.dumps(result.report(), indent=1) + "\n")


def announce(result: Result) -> None:
    for note in result.notes:
        print(f"lora_kernels: {note}", file=sys.stderr, flush=True)


def _required(result: Result, mode: str) -> Result:
    """Holds an explicit mode to its word."""
    if mode == "cuda" and "_ops_cuda" not in result.objects:
        raise SystemExit("LORA_KERNELS_BUILD=cuda, but there is no CUDA build:\n  " + "\n  ".join(result.notes))
    if mode == "cpu" and "_ops_cpu" not in result.objects:
        raise SystemExit("LORA_KERNELS_BUILD=cpu, but there is no CPU build:\n  " + "\n  ".join(result.notes))
    return result


def _key(torch_version: str | None) -> str:
    return f"{sys.implementation.cache_tag.replace('cpython-', 'cp')}-torch{torch_version or '-none'}"


def _settings(result: Result, mode: str) -> dict[str, str] | None:
    """CMake's cache variables, or None (with a note) where a tool is missing without which nothing builds."""
    tools = {"C++ compiler": toolchain.find_cxx()}
    tools |= {name: toolchain.find_tool(name) for name in ("cmake", "ninja")}
    missing = [name for name, path in tools.items() if path is None]
    if missing:
        result.notes.append(f"NATIVE KERNELS NOT BUILT, no {' and no '.join(missing)} found: reference backend only")
        return None
    result.tools = {name: path for name, path in tools.items() if path}
    torch, python, pybind11 = toolchain.find_torch(), toolchain.find_python_include(), toolchain.find_pybind11()
    if torch is not None and not toolchain.torch_is_recent(torch):
        result.notes.append(f"NATIVE OPS NOT BUILT: torch {torch.version} at {torch.root}, need 2.10 or newer")
        torch = None
    elif torch is None:
        result.notes.append(
            "NATIVE OPS NOT BUILT: no torch with headers found beside this Python. Install torch first, then this "
            "package (or name its folder in LORA_KERNELS_TORCH_DIR). Until then: reference backend only"
        )
    if python is None:
        result.notes.append("the _C module is not built: no Python.h (Debian: python3-dev). Ops run without it")
    elif pybind11 is None:
        result.notes.append("the _C module is not built: no pybind11. Ops run without it")
    if torch is None and (python is None or pybind11 is None):
        return None
    nvcc = toolchain.find_nvcc() if mode in ("auto", "cuda") and torch is not None else None
    if nvcc:
        result.tools["nvcc"] = nvcc
    elif mode == "cpu":
        result.notes.append("CUDA kernels not built: LORA_KERNELS_BUILD=cpu")
    elif torch is not None:
        result.notes.append("CUDA kernels not built: no nvcc found")
    result.torch = torch.version if torch else None
    with_module = python is not None and pybind11 is not None
    return {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": tools["ninja"],
        "CMAKE_CXX_COMPILER": ";".join(os.environ.get("CXX", "").split()) or tools["C++ compiler"],
        "LK_CMAKE": tools["cmake"],
        "LK_CUDA_COMPILER": nvcc or "",
        "LK_TORCH_DIR": str(torch.root) if torch else "",
        "LK_TORCH_VERSION": torch.version if torch else "",
        "LK_PYTHON_INCLUDE": str(python) if with_module else "",
        "LK_PYBIND11_INCLUDE": str(pybind11) if with_module else "",
        "LK_EMULATE_AVX512": os.environ.get(EMULATE_AVX512, ""),
        "LK_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
    }


def _build_in(root: Path, folder: Path, found: dict[str, str], result: Result, mode: str) -> None:
    wanted = ["_C"] if found["LK_PYTHON_INCLUDE"] else []
    wanted += ["_ops_cpu"] if found["LK_TORCH_DIR"] else []
    nvcc = found["LK_CUDA_COMPILER"]
    configured = _configure(root, folder, found)
    if not configured and nvcc and mode == "auto":
        found = {**found, "LK_CUDA_COMPILER": ""}
        configured = _configure(root, folder, found)
        if configured:
            result.notes.append(f"CUDA kernels not built: {nvcc} does not work here")
    if not configured:
        result.notes.append(
            f"NATIVE KERNELS NOT BUILT, the configuration failed (is {found['CMAKE_CXX_COMPILER']} a working C++17 "
            "compiler?): reference backend only"
        )
        return
    if not _ninja(folder, found, wanted):
        raise SystemExit("lora_kernels: the native build failed, see above (LORA_KERNELS_BUILD=none does without it)")
    if found["LK_CUDA_COMPILER"]:
        if _ninja(folder, found, ["_ops_cuda"]):
            wanted.append("_ops_cuda")
        else:
            result.notes.append("CUDA KERNELS NOT BUILT: nvcc failed on them, see above")
    result.objects = {name: folder / file_name(name) for name in wanted}


def _configure(root: Path, folder: Path, found: dict[str, str]) -> bool:
    """Runs CMake unless the folder was configured with these very settings and all their paths still exist."""
    stamp = folder / "lora_kernels_settings.json"
    wanted = {**found, "source": str(root)}
    try:
        known = json.loads(stamp.read_text())
    except (OSError, ValueError):
        known = None
    if known == wanted and (folder / "build.ninja").is_file() and not _vanished(folder):
        return True
    # A folder configured elsewhere, or by tools that are gone, cannot be repaired: start it afresh.
    fixed = ("source", "CMAKE_CXX_COMPILER")
    if known is None or any(known.get(name) != wanted[name] for name in fixed) or _vanished(folder):
        _wipe(folder)
    settings = [f"-D{name}={value}" for name, value in found.items() if name != "LK_CMAKE"]
    print(f"lora_kernels: configuring {folder}", flush=True)
    where = ["-S", str(root), "-B", str(folder), "-G", "Ninja", "--log-level=NOTICE"]
    done = _run([found["LK_CMAKE"], *where, *settings])
    if done:
        stamp.write_text(json.dumps(wanted, indent=1))
    else:
        _wipe(folder)
    return done


def _vanished(folder: Path) -> bool:
    """Whether a program named in CMake's cache is gone, as after an isolated build."""
    cache = folder / "CMakeCache.txt"
    if not cache.is_file():
        return False
    names = ("CMAKE_MAKE_PROGRAM:", "CMAKE_COMMAND:", "CMAKE_CXX_COMPILER:", "CMAKE_CUDA_COMPILER:")
    paths = [line.partition("=")[2].strip() for line in cache.read_text().splitlines() if line.startswith(names)]
    return any(path.startswith("/") and not os.path.exists(path) for path in paths)


def _wipe(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != ".lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _ninja(folder: Path, found: dict[str, str], targets: list[str]) -> bool:
    jobs = os.environ.get("MAX_JOBS")
    return _run([found["CMAKE_MAKE_PROGRAM"], "-C", str(folder), *(["-j", jobs] if jobs else []), *targets])


def _run(command: list[str]) -> bool:
    return subprocess.run(command, stdin=subprocess.DEVNULL).returncode == 0
