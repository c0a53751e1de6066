"""The full benchmark on a GPU, in parts: `python -m lora_kernels.bench.gpu PART --out FOLDER`. See bench/gpu.sh.

Ours on each GPU backend against the base alone (cuBLAS), in-place addmm_, PEFT and published kernels, eager and in
CUDA graphs. Weights rotate over copies larger than the L2 cache. The base product is timed through cuBLAS and through
cuBLASLt where the microseconds of choosing one do not count; the faster is what all are compared with. A part writes
FOLDER/PART.json after each case, and a part that was cut short goes on after the last one; a contender that hangs or
takes the GPU with it is left out by name (watched.py). ``report`` prints all parts that are there, with the limit
beside each ratio, and the bounds of gpu_bounds.py.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from ..ops import cuda_choice, dispatch, proof, triton_backend
from . import gpu_bounds, published, watched
from .cases import Case
from .contenders import contenders
from .cuda_timing import graphs_of, interleaved
from .measure import facts

_MODEL = ("llama3-8b-qo", "llama3-8b-gate-up", "llama3-8b-down", "llama3-8b-kv")
PARTS = {
    "prefill": [
        *(Case("gemm", shape, m) for shape, m in (("llama3-8b-qo", 4096), ("square-8192", 8192))),
        *(Case("forward", shape, m, r) for shape in _MODEL for m in (512, 2048, 8192) for r in (16, 64)),
        Case("forward", "llama3-8b-qo", 8192, 128),
    ],
    "decode": [
        *(Case("forward", shape, m, r) for shape in _MODEL for m in (1, 16, 64) for r in (16, 64)),
        Case("forward", "llama3-8b-qo", 8, 16),
    ],
    "train": [
        *(Case("train", shape, 8192, 16, dropout=p) for shape in _MODEL[:3] for p in (0.0, 0.1)),
        *(Case("dx", shape, 8192) for shape in _MODEL[:3]),
    ],
    "merge": [
        *(Case(op, shape) for op in ("merge", "unmerge", "switch") for shape in ("llama3-8b-qo", "llama3-8b-down")),
        *(Case(op, "llama3-8b-qo", rank=64) for op in ("merge", "switch")),
        *(Case(op, "llama3-8b-qo") for op in ("exact", "switch_exact")),
    ],
    "multi": [
        *(Case("multi", shape, m) for shape in _MODEL[:2] for m in (64, 512)),
        Case("multi", "llama3-8b-qo", 64, adapters=64),
    ],
    "grouped": [
        Case("grouped", shape, m) for shape in ("llama3-8b-qkv", "llama3-8b-gate-up") for m in (16, 512, 2048, 8192)
    ],
}
# The op behind each kind of case: a backend without it is not timed.
NEEDS = {
    "forward": "lora_linear",
    "gemm": "lora_linear",
    "dx": "lora_linear_backward",
    "train": "lora_linear_backward",
    "merge": "merge_",
    "unmerge": "merge_",
    "switch": "switch_",
    "exact": "merge_exact_",
    "switch_exact": "switch_exact_",
    "multi": "multi_lora_linear",
    "grouped": "grouped_lora_linear",
}
LEFT_OUT_OF_GRAPHS = ("peft",)  # its Python is what a user pays, and a graph would hide it
EAGER_ONLY = ("train", "exact", "switch_exact")  # autograd; residuals whose size the data decides
CUDA_ONLY = ("gemm",)  # Triton's kernels are made for an adapter
# Seconds without an answer after which a contender has hung: the first call compiles its kernels.
PATIENCE = 40


def _under(backend, run):
    """``run`` on a backend by name."""

    def named():
        with dispatch.use_backend(backend):
            return run()

    return named


def _through(library, run):
    """``run`` with torch's GEMMs from ``"cublas"`` or ``"cublaslt"``."""

    def chosen():
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(library)
        try:
            return run()
        finally:
            torch.backends.cuda.preferred_blas_library(before)

    return chosen


def runs_of(case, made):
    """{name: function}: ours once a backend that has the op, the others as they are, published kernels where a
    package is installed; and {name: why it is not timed}."""
    runs, absent = {name: run for name, run in made.items() if name != "ours"}, {}
    for backend in cuda_choice.PREFERENCE:
        reason = dispatch.unavailable(backend)
        there = reason is None and (
            NEEDS[case.op] in triton_backend.kernels() and case.op not in CUDA_ONLY
            if backend == "triton"
            else cuda_choice.refusal("cuda", NEEDS[case.op], ()) is None
        )
        if there:
            runs[f"ours {backend}"] = _under(backend, made["ours"])
        else:
            absent[f"ours {backend}"] = reason or f"has no kernel for {NEEDS[case.op]}"
    return runs, absent


def measure(case, seconds, notes):
    """{"eager": {name: seconds}, "graph": {...}, "absent": {name: why}} of a case, ``notes`` being kept of it."""

    def item(name):
        return f"{case.name}, {name}"

    def at(name):
        notes.at(item(name))

    if item("its tensors") in notes.lost:
        return {"eager": {}, "graph": {}, "absent": {item("its tensors"): notes.lost[item("its tensors")]}}
    at("its tensors")
    with contenders(case, "cuda") as made:
        runs, absent = runs_of(case, made)
        more, missing = published.contenders(case)
        runs, absent = runs | more, absent | missing
        if case.limit:  # the base is the product itself
            runs["base cublaslt"] = _through("cublaslt", made["base"])
        found = {"eager": {}, "graph": {}, "absent": absent}
        for name, run in list(runs.items()):
            if item(name) in notes.lost:
                absent[item(name)] = notes.lost[item(name)]
                del runs[name]
                continue
            at(name)
            try:
                run()
                torch.cuda.synchronize()
            except Exception as error:  # one contender that can not run must not hide the others
                notes.leave_if_lost(error)
                absent[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
                del runs[name]
        graphed = case.op not in EAGER_ONLY
        eager = {name: run for name, run in runs.items() if not graphed or name != "base cublaslt"}
        found["eager"] = interleaved(eager, 8, graphs=False, seconds=seconds, at=at) if eager else {}
        if graphed:
            kept = {name: run for name, run in runs.items() if name not in LEFT_OUT_OF_GRAPHS}
            graphs, missing = graphs_of(kept, 8, at)
            absent.update(missing)
            found["graph"] = interleaved(graphs, 8, seconds=seconds, at=at) if graphs else {}
    return found


def _stack(told):
    """The facts under which one result may stand beside another."""
    return {name: told[name] for name in ("commit", "kernels", "gpus", "versions", "backends")}


def _measured(path, told):
    """The results of a part that was cut short; none where the machine or the code was another."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    alike = all(found["facts"].get(name) == value for name, value in _stack(told).items())
    return found["results"] if alike else []


def _notes_of(folder, part):
    return folder / f"{part}.notes"


def run_part(name, folder, seconds):
    """Measures what of a part its file does not hold yet, and writes the file after each case."""
    # Beside the commit: a copy of a checkout has none.
    told, path = facts() | {"kernels": proof.stack()["kernels"]}, folder / f"{name}.json"
    results = _measured(path, told)
    known = {result["name"] for result in results}
    folder.mkdir(parents=True, exist_ok=True)
    notes = watched.Notes(_notes_of(folder, name))
    notes.under(_stack(told))
    for case in PARTS[name]:
        if case.name in known:
            continue
        found = measure(case, seconds, notes)
        notes.at(None)
        results.append({"case": dataclasses.asdict(case), "name": case.name, "limit": case.limit, **found})
        print("\n".join(lines(results[-1])), flush=True)
        partial = folder / f"{name}.partial"
        partial.write_text(json.dumps({"facts": told, "results": results}, indent=1) + "\n")
        partial.replace(path)


def lines(result):
    """Ratios to the base at its best, one line a mode."""
    for mode in ("eager", "graph"):
        times = result[mode]
        if "base" in times:
            name, base = min(((n, t) for n, t in times.items() if n.startswith("base")), key=lambda pair: pair[1])
            ratios = "".join(f"  {n} {t / base:.3f}" for n, t in times.items() if not n.startswith("base"))
            limit = f"  limit {result['limit']:.3f}" if result["limit"] else ""
            yield f"{result['name']:<52}{mode:<6} {name} {base * 1e6:9.1f} us{ratios}{limit}"


def report(folder):
    """The table of all parts that were measured, and what became of the bounds."""
    text, results = [], {}
    for name in PARTS:
        path = folder / f"{name}.json"
        if not path.is_file():
            text.append(f"\n{name}: not run")
            continue
        found = json.loads(path.read_text())
        gpu = ", ".join(gpu["name"] for gpu in found["facts"]["gpus"])
        text.append(f"\n{name}: {gpu}, commit {found['facts']['commit']}, times as a multiple of the base")
        if len(found["results"]) < len(PARTS[name]):
            text.append(f"  {len(found['results'])} of {len(PARTS[name])} cases")
        for result in found["results"]:
            text += lines(result)
        absent = {f"{n}: {why}" for result in found["results"] for n, why in result["absent"].items()}
        text += [f"  not timed: {line}" for line in sorted(absent)]
        results |= {result["name"]: result for result in found["results"]}
    text += ["\nbounds, of the medians in CUDA graphs but for training and exact merges:", *gpu_bounds.lines(results)]
    return "\n".join(text)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="lora_kernels.bench.gpu", description=__doc__.partition(":")[0])
    parser.add_argument("part", choices=(*PARTS, "report"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the parts' files")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each case and mode")
    parser.add_argument("--here", action="store_true", help="in this process, which may hang or die")
    args = parser.parse_args(argv)
    if args.part == "report":
        print(report(args.out))
        return 0
    if not torch.cuda.is_available():
        print("lora_kernels.bench.gpu: torch finds no CUDA device", file=sys.stderr)
        return 2
    if args.here:
        run_part(args.part, args.out, args.seconds)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    words = ["-m", __spec__.name, args.part, "--out", str(args.out), "--seconds", str(args.seconds), "--here"]
    notes = _notes_of(args.out, args.part)
    return watched.run([sys.executable, *words], notes, PATIENCE) or int(bool(watched.Notes(notes).lost))


if __name__ == "__main__":
    sys.exit(main())
