"""The GPU benchmark where there is no GPU: it says so, and its report is right for what was measured."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from lora_kernels.bench import cuda_timing, gpu, gpu_bounds, published, watched
from lora_kernels.bench.cases import GPU_OPS, Case
from lora_kernels.bench.contenders import contenders
from lora_kernels.ops import dispatch, library
from lora_kernels.tune.run import _arguments as tune_arguments

ROOT = pathlib.Path(__file__).resolve().parents[2]
FACTS = {"gpus": [{"name": "H200"}], "commit": "abc", "versions": {}, "backends": {}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the benchmark would run")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["decode", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    run = _script(str(tmp_path))
    assert run.returncode == 2
    assert "no CUDA device" in run.stderr
    assert "nothing was run. It needs a GPU from sm_80 on" in run.stderr
    assert not list(tmp_path.iterdir())


def _script(*arguments, python=sys.executable):
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": python})


def test_what_the_script_would_run_fits_ten_minutes_and_is_there(tmp_path):
    run = _script("--dry-run", str(tmp_path / "out"))
    assert run.returncode == 0
    parts = {name: (int(limit), command) for name, limit, *command in map(str.split, run.stdout.splitlines())}
    assert sum(limit for limit, _ in parts.values()) <= 600
    assert parts.keys() > gpu.PARTS.keys()
    for name in gpu.PARTS:
        assert parts[name][1] == [sys.executable, "-m", "lora_kernels.bench.gpu", name, "--out", str(tmp_path / "out")]
    command = parts["tune"][1]
    assert tune_arguments(command[command.index("tune") + 1 :]).budget < parts["tune"][0]
    for _, command in parts.values():
        for path in (word.removeprefix("--ignore=") for word in command if "tests/" in word or "bench/" in word):
            assert (ROOT / path).exists(), path
    assert not (tmp_path / "out").exists()


def test_the_script_refuses_what_it_does_not_know(tmp_path):
    run = _script("--dry-run", str(tmp_path), "decode", "nope")
    assert (run.returncode, run.stdout) == (2, "")
    assert "no part 'nope'; there are: build tests" in run.stderr
    run = _script(str(tmp_path), python="/nowhere/python")
    assert run.returncode == 2
    assert "no interpreter /nowhere/python" in run.stderr


def test_the_report_has_ratios_and_limits(tmp_path, monkeypatch):
    times = {"base": 1e-5, "addmm_": 1.2e-5, "ours triton": 1.1e-5}
    better = times | {"base cublaslt": 8e-6}
    found = {"eager": times, "graph": better, "absent": {"ours cuda": "not built"}}
    monkeypatch.setattr(gpu, "measure", lambda case, seconds, notes: found)
    monkeypatch.setattr(gpu, "facts", lambda: FACTS)
    gpu.run_part("decode", tmp_path, 0.1)
    text = gpu.report(tmp_path)
    assert "decode: H200, commit abc" in text
    assert "base      10.0 us  addmm_ 1.200  ours triton 1.100  limit 1.008" in text
    assert "base cublaslt       8.0 us  addmm_ 1.500  ours triton 1.375  limit 1.008" in text
    assert "not timed: ours cuda: not built" in text
    assert "train: not run" in text
    results = json.loads((tmp_path / "decode.json").read_text())["results"]
    assert len(results) == len(gpu.PARTS["decode"])


def test_a_part_that_was_cut_short_goes_on(tmp_path, monkeypatch):
    """It keeps the cases that it measured, unless the code or the machine is another by then."""
    begun = []

    def measure(case, seconds, notes):
        begun.append(case.name)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return {"eager": {"base": 1e-5}, "graph": {}, "absent": {}}

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu, "facts", lambda: FACTS)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_part("decode", tmp_path, 0.1)
    names = [case.name for case in gpu.PARTS["decode"]]
    assert f"  2 of {len(names)} cases" in gpu.report(tmp_path)
    gpu.run_part("decode", tmp_path, 0.1)
    assert begun == names[:3] + names[2:]
    results = json.loads((tmp_path / "decode.json").read_text())["results"]
    assert [result["name"] for result in results] == names
    assert " cases" not in gpu.report(tmp_path)
    monkeypatch.setattr(gpu, "facts", lambda: FACTS | {"commit": "def"})
    gpu.run_part("decode", tmp_path, 0.1)
    assert begun == names[:3] + names[2:] + names


# The benchmark as it is, of a contender that takes the process with it, with the CPU in the GPU's place.
_BROKEN = """
import contextlib, os, sys, torch
from lora_kernels.bench import gpu

def interleaved(runs, calls, at, **options):
    for name, run in runs.items():
        at(name)
        run()
    return dict.fromkeys(runs, 1.0)

made = {"base": int, "ours cuda": os.abort, "ours triton": int, "addmm_": int}
gpu.contenders = lambda case, device: contextlib.nullcontext(made)
gpu.runs_of = lambda case, made: (dict(made), {})
gpu.published.contenders = lambda case: ({}, {})
gpu.graphs_of = lambda runs, calls, at: (runs, {})
gpu.interleaved, gpu._through = interleaved, lambda library, run: run
gpu.facts = lambda: {"gpus": [{"name": "none"}], "commit": None, "versions": {}, "backends": {}}
gpu.PARTS = {"decode": gpu.PARTS["decode"][:1]}
torch.cuda.synchronize, torch.cuda.is_available = int, lambda: True
gpu.main(sys.argv[1:])
"""


def test_a_contender_that_ends_the_process_is_left_out_by_name(tmp_path):
    notes = tmp_path / "decode.notes"
    command = [sys.executable, "-c", _BROKEN, "decode", "--out", str(tmp_path), "--here"]
    assert watched.run(command, notes, patience=60) == 0
    (result,) = json.loads((tmp_path / "decode.json").read_text())["results"]
    case = result["name"]
    assert result["graph"].keys() == {"base", "ours triton", "addmm_", "base cublaslt"}
    assert result["absent"] == {f"{case}, ours cuda": "the process ended with -6"}
    assert f"not timed: {case}, ours cuda: the process ended with -6" in gpu.report(tmp_path)


def test_the_command_watches_over_a_process_that_measures(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(watched, "run", lambda command, notes, patience: ran.append((command, notes)) or 0)
    assert gpu.main(["decode", "--out", str(tmp_path)]) == 0
    ((command, notes),) = ran
    assert command[1:5] == ["-m", "lora_kernels.bench.gpu", "decode", "--out"]
    assert command[5:] == [str(tmp_path), "--seconds", "0.3", "--here"]
    lost = watched.Notes(notes)
    lost.lost["one"] = "no answer in 40 s"
    lost.write()
    assert gpu.main(["decode", "--out", str(tmp_path)]) == 1


def test_one_graph_that_can_not_be_captured_hides_no_other(monkeypatch):
    def graph_of(run, calls):
        return run()

    monkeypatch.setattr(cuda_timing, "graph_of", graph_of)
    graphs, absent = cuda_timing.graphs_of({"base": lambda: "graph", "ours": lambda: 1 / 0}, 8)
    assert graphs == {"base": "graph"}
    assert absent == {"ours in a CUDA graph": "ZeroDivisionError: division by zero"}


def test_the_sanitizer_has_golden_vectors_and_both_products():
    text = (ROOT / "bench" / "sanitize.sh").read_text()
    (small,) = re.findall(r"^small='(.+)'$", text, re.MULTILINE)
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests/gpu/test_gpu_cuda.py"), "--collect-only", "-q"]
    found = subprocess.run([*command, "-p", "no:cacheprovider", "-k", small], capture_output=True, text=True).stdout
    for name in ("test_golden[", "test_odd_sizes[(33, ", "test_gradient_of_x[(33, "):
        assert name in found, found
    assert "test_exact_merge" not in found


def test_the_library_of_the_base_is_chosen_for_the_call_alone(monkeypatch):
    chosen = ["default"]

    def preferred(library=None):
        if library is not None:
            chosen.append(library)
        return chosen[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    assert gpu._through("cublaslt", lambda: chosen[-1])() == "cublaslt"
    assert chosen[-1] == "default"


@pytest.mark.parametrize("built", [True, False])
def test_the_base_has_the_better_of_two_libraries_where_choosing_is_not_timed(built, tmp_path, monkeypatch):
    def through(library, run):
        return run if built else lambda: 1 / 0

    monkeypatch.setattr(gpu, "contenders", lambda case, device: contextlib.nullcontext({"base": int, "ours": int}))
    monkeypatch.setattr(gpu, "runs_of", lambda case, made: (dict(made), {}))
    monkeypatch.setattr(gpu.published, "contenders", lambda case: ({}, {}))
    monkeypatch.setattr(gpu, "interleaved", lambda runs, calls, **options: dict.fromkeys(runs, 1.0))
    monkeypatch.setattr(gpu, "graphs_of", lambda runs, calls, at: (runs, {}))
    monkeypatch.setattr(gpu, "_through", through)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for part, graph, eager in (("decode", built, False), ("train", False, built), ("merge", False, False)):
        found = gpu.measure(gpu.PARTS[part][0], 0.1, watched.Notes(tmp_path / f"{part}.notes"))
        assert ("base cublaslt" in found["graph"], "base cublaslt" in found["eager"]) == (graph, eager)
        assert ("base cublaslt" in found["absent"]) == (not built and part != "merge")


def test_every_case_has_an_op_and_a_limit_where_the_base_is_the_product():
    for case in (case for part in gpu.PARTS.values() for case in part):
        assert gpu.NEEDS[case.op]
        assert (case.limit is None) == (case.op in ("merge", "unmerge", "switch", "exact", "switch_exact"))


def test_every_bound_is_of_a_case_that_is_measured():
    measured = {case.name for part in gpu.PARTS.values() for case in part}
    assert {asked.case.name for asked in gpu_bounds.bounds()} <= measured


def test_what_became_of_the_bounds():
    cases = {case.name: case for part in gpu.PARTS.values() for case in part}
    times = {"base": 1.0, "base cublaslt": 0.98, "addmm_": 1.2, "copy_": 1.0, "ours cuda": 1.05, "ours triton": 1.3}
    results = {name: {"case": dataclasses.asdict(case), "eager": times, "graph": {}} for name, case in cases.items()}
    *lines, last = gpu_bounds.lines(results)
    missed = "forward llama3-8b-qo M=8192 r=16 bfloat16: ours cuda / base 1.071 (≤ 1.05) missed"
    assert missed in lines
    assert "forward llama3-8b-qo M=8192 r=128 bfloat16: ours cuda / base 1.071 (≤ 1.1) pass" in lines
    assert "merge llama3-8b-down r=16 bfloat16: ours cuda / copy_ 1.050 (≤ 1.111) pass" in lines
    assert "forward llama3-8b-kv M=1 r=16 bfloat16: ours triton / addmm_ 1.083 (≤ 1) missed" in lines
    # 64 adapters of rank 16 are half as many bytes as the weight, and a copy moves the weight twice.
    assert any("64 adapters: ours cuda / bytes at the speed of a copy 1.400 (≤ 1.2) missed" in line for line in lines)
    counts = [sum(line.endswith(verdict) for line in lines) for verdict in ("pass", "missed")]
    assert last == f"{counts[0]} met, {counts[1]} missed, 0 not measured"
    *lines, last = gpu_bounds.lines({})
    assert not lines
    # What they are compared with may have been lost.
    results = {name: result | {"eager": {"ours cuda": 1.0, "ours triton": 1.0}} for name, result in results.items()}
    assert list(gpu_bounds.lines(results)) == [f"0 met, 0 missed, {sum(counts)} not measured"]
    assert last.startswith("0 met, 0 missed, ")


@pytest.mark.parametrize("case", [Case(op, "minilm-384", 4, dtype="float32") for op in GPU_OPS], ids=lambda c: c.op)
def test_contenders_of_the_gpu_alone_compute_what_the_base_does(case, monkeypatch):
    """On a CPU, where the ops are known to be right."""
    if case.op == "gemm":  # public calls have a rank of one at least, and the CPU's kernels insist
        monkeypatch.setattr(library, "op", dispatch.REFERENCE.__getitem__)
    with contenders(case) as made:
        for _ in range(5):
            expected, found = made["base"](), made["ours"]()
        if case.op == "gemm":
            torch.testing.assert_close(found, expected)
        if case.op == "dx":
            torch.testing.assert_close(found, made["addmm_"]())


def test_a_package_that_is_not_there_is_named():
    runs, absent = published.contenders(gpu.PARTS["decode"][0])
    assert set(runs) | set(absent) == {"unsloth", "vllm"}
