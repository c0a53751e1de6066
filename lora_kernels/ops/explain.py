"""``explain()``: which path ran, and why not a faster one."""

import torch

from . import cuda_backend, cuda_choice, dispatch, library, triton_backend

_CPU_PATHS = {
    "stream": "own kernel: the weight is read once and the update joins in registers",
    "panel": "own kernel for dY W, and for a weight stored by columns",
    "turned": "own kernel over x turned: the weight is read where it lies and the update joins in registers",
    "vendor": "torch's GEMM, then the update in place: faster than `stream` for this many rows, or B is zero (float32)",
    "widened": "torch's float32 GEMM over blocks of the weight, as the processor has no half-precision units",
    "add": "no base product: lora_add_, lora_shrink, lora_expand_",
}


def _cpu_choice():
    """What ``auto`` takes for CPU tensors, by op."""
    missing = sorted(name for name in library.SCHEMAS if not library.has_cpu_kernel(name))
    if len(missing) == len(library.SCHEMAS):
        return "reference"
    return "cpu" + (f", but reference for {', '.join(missing)}" if missing else "")


def _cuda_choice():
    """What ``auto`` takes for CUDA tensors, by op, as far as that does not depend on the call."""
    proven = {b: cuda_choice.proven_here(b) for b in cuda_choice.PREFERENCE if dispatch.unavailable(b) is None}
    first = "".join(f"{b} for {', '.join(sorted(names))}, then " for b, names in proven.items() if names)
    return f"{first}reference"


def _gpu_kernels(backend):
    """What a GPU backend has and what of that no GPU has run."""
    if backend == "triton":
        names = set(triton_backend.kernels())
        where = ["    in Triton's interpreter, on CPU tensors"] if triton_backend.interpreted() else []
    else:
        names = {name for name in library.SCHEMAS if library.has_cuda_kernel(name)}
        where = [f"    {ops}: {limit}" for ops, limit in cuda_backend.LIMITS.items()]
    unproven = ", ".join(sorted(names - cuda_choice.proven_here(backend)))
    return where + ([f"    {unproven}: {cuda_choice.UNPROVEN}"] if unproven else [])


def _cpu_paths():
    report = dict(entry.split("=") for entry in torch.ops.lora_kernels._cpu_paths().split())
    last = report.pop("last")
    lines = []
    for path, count in report.items():
        mark = " (the last one)" if path == last and count != "0" else ""
        lines.append(f"    {path:7}{count:>9} calls{mark}: {_CPU_PATHS[path]}")
    return lines


def explain() -> str:
    """A report to print: the backends that can run here and why others can not, and the paths that ran.

    Counts are of this process.
    """
    setting = dispatch.forced or "auto"
    lines = [f"backend setting: {setting}; batch_invariant: {'on' if dispatch.batch_invariant else 'off'}"]
    lines += [dispatch.refusal] if setting == dispatch.refused_backend else []
    lines.append(f"auto runs: cpu tensors on {_cpu_choice()}; cuda tensors on {_cuda_choice()}")
    for backend in dispatch.BACKENDS[1:]:
        reason = dispatch.unavailable(backend)
        lines.append(f"{backend}: {'can run' if reason is None else 'can not run: ' + reason}")
        if backend == "cpu" and reason is None:
            lines += _cpu_paths()
        if backend in cuda_choice.PREFERENCE and reason is None:
            lines += _gpu_kernels(backend)
    for (name, backend, why), count in sorted(cuda_choice.calls.items()):
        lines.append(f"cuda tensors, {name}: {backend} ran {count} calls{f' ({why})' if why else ''}")
    if dispatch.reference_calls:
        ran = ", ".join(f"{name} {count}" for name, count in sorted(dispatch.reference_calls.items()))
        lines.append(f"reference ran: {ran} calls; no native kernel for those tensors, or it was asked for")
    return "\n".join(lines)
