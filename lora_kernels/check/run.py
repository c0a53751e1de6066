"""The command: a table of error / budget (see testing/budget.py), the worst of the shapes; above 1 fails.

On a GPU, what passes is kept (``ops/proof.py``): from then on ``auto`` takes those kernels there.
"""

import time

import torch

from .. import arguments, check
from ..ops import cuda_choice, dispatch, library, proof, triton_backend
from ..testing import error_ratio

SHAPES = ((1, 256, 192, 16), (8, 131, 67, 5), (70, 384, 384, 8), (130, 128, 96, 64))  # M, K, N, rank
GPU_SHAPES = (*SHAPES, (16, 1024, 2048, 16), (600, 2048, 1024, 32), (1100, 1024, 2048, 40))
INTERPRETED_SHAPES = ((1, 64, 48, 5), (20, 70, 33, 24))  # Triton's interpreter is slow


def main(argv=None):
    args = _arguments(argv)
    start, failures = time.perf_counter(), []
    print(f"{'op':<30}" + "".join(f"{name:>19}" for name in check.DTYPES) + "   (error / budget)")
    proven = {}
    for backend in [args.backend] if args.backend else dispatch.BACKENDS[1:]:
        reason = dispatch.unavailable(backend)
        if reason is None and args.backend is None and backend == "triton" and triton_backend.interpreted():
            reason = "only in Triton's interpreter, which is slow: ask for it by name"
        if reason is not None:
            print(f"\n{backend}: can not run here: {reason}")
            failures += [f"{backend}: {reason}"] if args.backend else []
            continue
        for device in _devices(backend):
            print(f"\n{backend} on {device}")
            found = check_backend(backend, device)
            failures += [failure for each in found.values() for failure in each]
            if device == "cuda" and backend in proof.BACKENDS:
                proven[backend] = passed(found)
    if proven:
        failures += _keep(proven)
    print(f"\n{len(failures)} failed, {time.perf_counter() - start:.1f} s")
    for failure in failures:
        print(f"  {failure}")
    return 1 if failures else 0


def _arguments(argv):
    parser = arguments.parser(
        "check",
        "Self-test of every op against float64. A cell is error / budget; above 1 fails. Exit code 1 when one does.",
    )
    parser.add_argument("--backend", choices=dispatch.BACKENDS[1:], help="only this one; default: all that can run")
    return parser.parse_args(argv)


def _devices(backend):
    if backend == "reference":
        return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return ["cpu"] if backend == "cpu" or (backend == "triton" and triton_backend.interpreted()) else ["cuda"]


def _shapes(backend, device):
    if device == "cuda":
        return GPU_SHAPES
    return INTERPRETED_SHAPES if backend == "triton" else SHAPES


def check_backend(backend, device):
    """``{check: [failure]}`` of the checks that ran with one dtype at least; prints a line of each."""
    shapes, found = _shapes(backend, device), {}
    for name, run in check.CHECKS.items():
        missing = [op for op in check.NEEDS[name] if not _has(backend, op)]
        if missing:
            print(f"  {name:<28}   not checked: no kernel for {', '.join(missing)}")
            continue
        cells, failures, ran = [], [], False
        for label, dtypes in check.DTYPES.items():
            cell, reason = _cell(backend, device, run, dtypes, shapes)
            cells.append(f"{cell} FAIL" if reason else cell)
            ran |= cell != "refused"
            if reason:
                failures.append(f"{backend} on {device}, {name}, {label}: {reason}")
        print(f"  {name:<28}" + "".join(f"{cell:>19}" for cell in cells), flush=True)
        if ran:
            found[name] = failures
    return found


def _cell(backend, device, run, dtypes, shapes):
    """What the table says of one check in one dtype, and why it failed, None where it did not."""
    try:
        with dispatch.use_backend(backend):
            ratio = max(error_ratio(*result) for shape in shapes for result in run(shape, *dtypes, device))
    except cuda_choice.Refused:
        return "refused", None
    except Exception as error:  # one broken op must not hide the others
        return type(error).__name__, f"{type(error).__name__}: {error}"
    # a NaN fails
    return f"{ratio:.2f}", None if ratio <= 1 else f"error is {ratio:.2f} of the budget"


def _has(backend, op):
    """Whether the backend has a kernel of its own for an op."""
    if backend in ("reference", "cpu"):
        return backend == "reference" or library.has_cpu_kernel(op)
    return op in triton_backend.kernels() if backend == "triton" else cuda_choice.refusal("cuda", op, ()) is None


def passed(found):
    """The ops of which every check ran and passed, from :func:`check_backend`'s result."""
    wanted = {op: {name for name, needs in check.NEEDS.items() if op in needs} for op in library.SCHEMAS}
    good = {name for name, failures in found.items() if not failures}
    return {op for op, names in wanted.items() if names and names <= good}


def _keep(proven):
    """Keeps what was proven on this GPU; failures."""
    index = torch.cuda.current_device()
    gpu = proof.name_of(index)
    before = proof.read(gpu)
    try:
        path = proof.write(gpu, {**before, **proven})
    except OSError as error:
        return [f"the proof could not be kept: {error}"]
    for backend, ops in proven.items():
        print(f"\n{backend}, proven on {gpu}, so that auto takes them here: {', '.join(sorted(ops)) or 'nothing'}")
    print(f"kept in {path}")
    return []
