"""``explain()``: which path ran, and why not a faster one."""

import torch

from . import dispatch, library

_CPU_PATHS = {
    "stream": "own kernel: the weight is read once and the update joins in registers",
    "panel": "own kernel for dY W, and for a weight stored by columns",
    "vendor": "torch's GEMM, then the update added in place: faster than `stream` for this many rows",
    "add": "no base product: lora_add_, lora_shrink, lora_expand_",
}


def _choice(device_type):
    """What ``auto`` takes for tensors of a device, by op."""
    unproven = dispatch.UNPROVEN_ON_CUDA if device_type == "cuda" else ()
    native = [name for name in library.SCHEMAS if library.has_kernel(name, device_type) and name not in unproven]
    if not native:
        return "reference"
    missing = sorted(set(library.SCHEMAS) - set(native))
    return device_type + (f", but reference for {', '.join(missing)}" if missing else "")


def _cpu_paths():
    report = dict(entry.split("=") for entry in torch.ops.lora_kernels._cpu_paths().split())
    last = report.pop("last")
    lines = []
    for path, count in report.items():
        mark = " (the last one)" if path == last and count != "0" else ""
        lines.append(f"    {path:7}{count:>9} calls{mark}: {_CPU_PATHS[path]}")
    return lines


def explain():
    """A report to print: the backends that can run here and why others can not, and the paths that ran.

    Counts are of this process.
    """
    setting = dispatch.forced or "auto"
    lines = [f"backend setting: {setting}; batch_invariant: {'on' if dispatch.batch_invariant else 'off'}"]
    lines.append(f"auto runs: cpu tensors on {_choice('cpu')}; cuda tensors on {_choice('cuda')}")
    for backend in dispatch.BACKENDS[1:]:
        reason = dispatch.unavailable(backend)
        lines.append(f"{backend}: {'can run' if reason is None else 'can not run: ' + reason}")
        if backend == "cpu" and reason is None:
            lines += _cpu_paths()
        if backend == "cuda" and reason is None:
            unproven = ", ".join(sorted(dispatch.UNPROVEN_ON_CUDA))
            lines.append(f"    {unproven}: compiled, not yet run on hardware; runs only when asked for by name")
    if dispatch.reference_calls:
        ran = ", ".join(f"{name} {count}" for name, count in sorted(dispatch.reference_calls.items()))
        lines.append(f"reference ran: {ran} calls; no native kernel for those tensors, or it was asked for")
    return "\n".join(lines)
