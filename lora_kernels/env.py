"""What was built, what runs and why not the rest: `python -m lora_kernels env [--json]`."""

import importlib.metadata
import json
import os
import platform
import sys
import textwrap
from pathlib import Path

import torch

from . import _native, arguments
from .ops import cuda_backend, cuda_choice, dispatch, triton_backend

VARIABLES = {
    "LORA_KERNELS_BACKEND": ("auto", "backend of every op: auto, reference, cpu, triton, cuda"),
    "LORA_KERNELS_BATCH_INVARIANT": ("0", "1: a row's bits do not depend on the other rows of its batch"),
    "LORA_KERNELS_CPU_ISA": ("the best there is", "cap on the CPU kernels: portable, avx2, avx512, avx512bf16, amx"),
    "LORA_KERNELS_BUILD": ("auto", "at build time: auto, cpu, cuda, none"),
    "LORA_KERNELS_TORCH_DIR": ("found", "at build time: folder of the torch whose headers to use"),
    "LORA_KERNELS_EMULATE_AVX512": ("0", "at build time, for tests: 1: AVX-512 kernels that run on a CPU with AVX2"),
}
_PACKAGES = ("torch", "triton", "numpy", "safetensors", "peft", "transformers")
NEVER_RUN = "compiled, not yet run on hardware"


def collect() -> dict:
    """The facts as plain values, ready for JSON. Loads the CPU ops, but neither CUDA ops nor a CUDA context."""
    _native.load()
    return {
        "versions": _versions(),
        "built": _built(),
        "backends": _backends(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }


def report() -> str:
    """The same for a person to read."""
    facts = collect()
    lines = ["lora_kernels environment", "", "versions"]
    lines += [f"  {name:<14} {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines += ["", "built"]
    lines += [_row(name, _plain(value)) for name, value in facts["built"].items() if name != "notes"]
    lines += [f"  note: {note}" for note in facts["built"]["notes"]]
    lines += ["", "backends"]
    for name, state in facts["backends"].items():
        lines.append(_row(name, f"{'yes' if state['available'] else 'no'}: {state['detail']}"))
    lines += ["", "cpu"]
    lines += [_row(name, _plain(value)) for name, value in facts["cpu"].items()]
    lines += ["", "gpu"]
    lines += [f"  {gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB" for gpu in facts["gpus"]] or [
        "  none"
    ]
    lines += ["", "variables (default): meaning"]
    for name, (default, meaning) in VARIABLES.items():
        value = facts["environment"][name]
        setting = f"= {value}" if value is not None else f"({default})"
        meaning += f"; {dispatch.refusal}" if dispatch.refusal and name in dispatch.refusal else ""
        lines += textwrap.wrap(f"{name} {setting}: {meaning}", 78, initial_indent="  ", subsequent_indent=" " * 6)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the report; returns the exit code."""
    parser = arguments.parser("env", __doc__.partition(":")[0])
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    args = parser.parse_args(argv)
    print(json.dumps(collect(), indent=2) if args.json else report())
    return 0


def _versions() -> dict[str, str | None]:
    own = (Path(__file__).parent / "VERSION").read_text().strip()
    return {"lora_kernels": own, "python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _built() -> dict:
    """What the build left behind (_build.json) and what the compiled module says of itself."""
    try:
        build = json.loads((Path(__file__).parent / "_build.json").read_text())
    except (OSError, ValueError):
        build = {"objects": [], "notes": ["no native build was made here; reinstall to make one"], "torch": None}
    info = _native.module.build_info() if _native.module else {}
    return {
        "objects": build["objects"],
        "compiler": info.get("compiler") or None,
        "with torch": build["torch"],
        "cpu isas": _listed(info.get("cpu_isas")),
        "cuda toolkit": info.get("cuda") or None,
        "cuda archs": _listed(info.get("cuda_archs")),
        "cuda ops": _cuda_ops() if "_ops_cuda" in build["objects"] else [],
        "notes": build["notes"],
    }


def _cuda_ops():
    proven = cuda_choice.proven_here("cuda")
    return [name if name in proven else f"{name} ({NEVER_RUN})" for name in cuda_backend.names()]


def _backends() -> dict[str, dict]:
    problem, triton_problem = _native.cuda_problem(), triton_backend.problem()
    isa = _native.ISA_LEVELS[torch.ops.lora_kernels._cpu_isa()] if _native.cpu_available else None
    return {
        "reference": {"available": True, "detail": "plain torch, every device"},
        "cpu": {
            "available": _native.cpu_available,
            "detail": f"C++ kernels on {isa}" if isa else _native.cpu_reason,
        },
        "cuda": {
            "available": problem is None,
            "detail": problem or _proof("cuda"),
        },
        "triton": {
            "available": triton_problem is None,
            "detail": triton_problem or _proof("triton"),
        },
    }


def _proof(backend):
    """What ``auto`` takes a GPU backend for."""
    ops = cuda_choice.proven_here(backend)
    return f"auto takes it for {', '.join(sorted(ops))}" if ops else f"only when asked for ({cuda_choice.UNPROVEN})"


def _cpu() -> dict:
    features = _native.module.cpu_features() if _native.module else {}
    return {
        "machine": platform.machine(),
        "model": _cpu_model(),
        "features": sorted(name for name, there in features.items() if there),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _gpus() -> list[dict]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "capability": f"{p.major}{p.minor}", "memory_gib": round(p.total_memory / 2**30)}
        for p in found
    ]


def _listed(text: str | None) -> list[str]:
    return text.split(",") if text else []


def _row(name: str, text: str) -> str:
    """A name and what is said of it, in lines of a terminal's width."""
    return textwrap.fill(text, 78, initial_indent=f"  {name:<14} ", subsequent_indent=" " * 17)


def _plain(value) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "unknown" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
