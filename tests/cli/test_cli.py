"""The command line: usage, check, bench, demo."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from lora_kernels import ops
from lora_kernels.__main__ import COMMANDS, main
from lora_kernels.bench import cases, targets
from lora_kernels.bench.contenders import contenders
from lora_kernels.check import run as check_run
from lora_kernels.ops import dispatch


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["--help"]])
def test_usage_lists_the_commands(argv, capsys):
    assert main(argv) == (0 if argv == ["--help"] else 2)
    output = capsys.readouterr()
    for name in COMMANDS:
        assert name in output.out + output.err


def test_every_command_exists(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        assert "usage" in capsys.readouterr().out


def test_check_passes(capsys):
    assert main(["check"]) == 0
    assert "0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_check_fails_when_an_op_is_broken(fault, monkeypatch, capsys):
    real = ops.merge_

    def broken(weight, lora_a, lora_b, scaling):
        if fault == "raises":
            raise RuntimeError("no such kernel")
        return real(weight, lora_a, lora_b, 1.01 * scaling if fault == "wrong" else float("nan"))

    monkeypatch.setattr(ops, "merge_", broken)
    assert main(["check", "--backend", "reference"]) == 1
    output = capsys.readouterr().out
    assert "reference on cpu, merge_, float32" in output
    assert "unmerge_, " not in output.partition(" failed, ")[2]


def test_check_of_a_backend_that_can_not_run(capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: f"{backend} is asleep")
    assert main(["check", "--backend", "triton"]) == 1
    assert "triton: can not run here: triton is asleep" in capsys.readouterr().out


def test_check_says_what_a_backend_lacks(capsys, monkeypatch):
    monkeypatch.setattr(check_run, "_has", lambda backend, op: op != "merge_")
    assert main(["check", "--backend", "reference"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not checked: no kernel for merge_\n") == 3


def test_bench_writes_json_and_plot(tmp_path, capsys):
    json_file, plot_file = tmp_path / "bench.json", tmp_path / "sub" / "bench.png"
    argv = ["bench", "--suite", "quick", "--seconds", "0.05", "--json", str(json_file)]
    if importlib.util.find_spec("matplotlib"):
        argv += ["--plot", str(plot_file)]
    assert main(argv) == 0
    found = json.loads(json_file.read_text())
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["model"]
    assert found["threads"] == torch.get_num_threads()
    assert found["date"]
    assert len(found["results"]) == len(cases.suite("quick"))
    assert all(result["ours/base"] > 0 for result in found["results"])
    assert not importlib.util.find_spec("matplotlib") or plot_file.stat().st_size > 0
    assert "ours/base" in capsys.readouterr().out


def test_bench_keeps_what_it_measured_before_it_was_cut_short(tmp_path, monkeypatch):
    from lora_kernels.bench import run

    measure, json_file, done = run.measure, tmp_path / "bench.json", []

    def second_is_cut(case, *args):
        if done:
            raise KeyboardInterrupt
        done.append(case)
        return measure(case, *args)

    monkeypatch.setattr(run, "measure", second_is_cut)
    with pytest.raises(KeyboardInterrupt):
        main(["bench", "--suite", "quick", "--seconds", "0.05", "--json", str(json_file)])
    assert len(json.loads(json_file.read_text())["results"]) == 1


def test_bench_targets_exit_code(monkeypatch, capsys):
    case = cases.suite("quick")[0]
    met = targets.Target(case, "ours / base", 1e9, targets._ours)
    missed = targets.Target(case, "ours / base", 0.0, targets._ours)
    for found, code in (([met], 0), ([met, missed], 1)):
        monkeypatch.setattr("lora_kernels.bench.run.targets", lambda found=found: found)
        assert main(["bench", "--suite", "targets", "--seconds", "0.05"]) == code
    assert "MISS" in capsys.readouterr().out


def test_bench_refuses_bad_numbers(capsys):
    for argv in (["--tokens", "0"], ["--seconds", "0"], ["--threads", "0"], ["--shape", "nowhere"]):
        with pytest.raises(SystemExit) as stopped:
            main(["bench", *argv])
        assert stopped.value.code == 2
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--shape", "llama3-8b-qkv", "--op", "grouped", "forward"])
    assert "llama3-8b-qkv go with --op grouped" in capsys.readouterr().err


@pytest.mark.parametrize("op", cases.OPS)
def test_contenders_do_the_same_work(op, monkeypatch):
    """Each contender of a case gives the same result, where it gives one that can be seen; copy_ is a measure of
    bandwidth alone."""
    monkeypatch.setitem(cases.SHAPES, "tiny", (24, 16))
    case = cases.Case(op, "4x4" if op == "overhead" else "tiny", 16, 4, "float32")
    with contenders(case) as runs:
        assert {"base", "ours"} <= set(runs)
        results = {name: run() for name, run in runs.items()}
    if op in ("forward", "multi", "grouped"):
        # the weights are copies of one, so whose turn it is does not matter
        for name in set(results) - {"base", "ours", "copy_"}:
            torch.testing.assert_close(results[name], results["ours"])


def test_suites():
    for name in ("quick", "default", "full"):
        found = cases.suite(name)
        assert len({case.name for case in found}) == len(found)
    assert {case.num_tokens for case in cases.suite("full") if case.op == "forward"} == set(cases.NUM_TOKENS)
    with pytest.raises(ValueError, match="suite"):
        cases.suite("nowhere")
    # On a CPU models run each projection by itself: of the grouped op nothing is promised there.
    assert {target.case.op for target in targets.targets()} == set(cases.OPS) - {"grouped"}


def test_sizes_of_a_grouped_case():
    qkv, pair = cases.Case("grouped", "llama3-8b-qkv", 16), cases.Case("grouped", "llama3-8b-gate-up", 16)
    assert (qkv.sizes, qkv.widths) == ((4096, 6144), (4096, 1024, 1024))
    assert (pair.sizes, pair.widths) == ((4096, 28672), (14336, 14336))
    assert qkv.limit == pytest.approx(1 + 16 * (3 * 4096 + 6144) / (4096 * 6144))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_terminal_and_says_what_each_option_is(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m lora_kernels {name} ")
    assert max(map(len, text.splitlines())) <= 80
    options = re.split(r"\n  (?=-)", text.partition("\noptions:")[2])[1:]
    assert options
    assert not [option for option in options if not re.search(r"\S\s{2,}\S", option)]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["bench", "--device", "gpu"], "--device: expected cpu or cuda, got 'gpu'"),
        (["bench", "--device", "cuda:99"], "--device: torch finds"),
        (["demo", "--device", "gpu"], "--device: expected cpu or cuda, got 'gpu'"),
        (["demo", "--device", "cuda:99"], "--device: torch finds"),
        (["bench", "--json", "."], "--json: expected a file, . is a folder"),
        (["bench", "--json", "/dev/null/x.json"], "--json: /dev/null/x.json can not be written"),
        (["bench", "--suite", "full", "--op", "merge"], "--suite full: its cases are fixed, it does not go with --op"),
        (["bench", "--suite", "targets", "--op", "merge", "--rank", "8"], "it does not go with --rank"),
    ],
)
def test_options_that_can_not_work_are_refused_before_anything_runs(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_report_of_the_environment_fits_a_terminal(capsys):
    assert main(["env"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.skipif(dispatch.unavailable("cuda") is None, reason="there is a GPU")
@pytest.mark.parametrize(("command", "code", "stream"), [("env", 0, "stdout"), ("tune", 1, "stderr")])
def test_a_backend_that_the_environment_names_and_that_can_not_run_is_reported(command, code, stream):
    program = (
        "import sys; from lora_kernels import __main__ as cli; import lora_kernels as lk, torch\n"
        "compute = lambda argv: lk.ops.merge_(*map(torch.ones, [(2, 2), (1, 2), (2, 1)]), 1.0)\n"
        "import lora_kernels.tune; lora_kernels.tune.main = compute\n"
        f"sys.argv = ['lora_kernels', '{command}']; sys.exit(cli.console())"
    )
    environment = {**os.environ, "LORA_KERNELS_BACKEND": "cuda"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == code
    assert "LORA_KERNELS_BACKEND: backend 'cuda' can not run here" in " ".join(getattr(run, stream).split())
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_a_shell_gets_no_traceback_of_ctrl_c_and_of_a_closed_pipe(error, code):
    program = (
        "import sys; from lora_kernels import __main__ as cli\n"
        f"def main(): raise {error.__name__}\n"
        "cli.main = main; sys.exit(cli.console())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == code
    assert "Traceback" not in run.stderr
