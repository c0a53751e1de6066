"""``python -m lora_kernels tune`` with a timer of the test's own: what it measures, keeps, refuses and goes on with."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from lora_kernels.ops import tuning
from lora_kernels.ops.grouped import config as grouped_config
from lora_kernels.ops.linear import config, train_config
from lora_kernels.ops.multi import config as multi_config

pytest.importorskip("lora_kernels.ops.linear.triton")
from lora_kernels.ops.linear import triton as triton_linear
from lora_kernels.testing import make_linear
from lora_kernels.tune import calls, run
from lora_kernels.tune.candidates import Gpu, Problem, candidates, problems, shared_bytes

GPUS = {
    (8, 0): Gpu("NVIDIA A100", (8, 0), 108, 166912),
    (8, 9): Gpu("NVIDIA L40S", (8, 9), 142, 101376),
    (9, 0): Gpu("NVIDIA H200", (9, 0), 132, 232448),
    (10, 0): Gpu("NVIDIA B200", (10, 0), 148, 232448),
}
SMALL = Gpu("interpreter", (0, 0), 4, 101376)
TABLE = Path(__file__).resolve().parents[2] / "bench" / "results" / "static" / "triton.json"


def _rule(problem, gpu):
    """The configuration that the launcher of the op takes where nothing was measured."""
    m, k, n, r = problem.num_tokens, problem.in_features, problem.out_features, problem.rank
    rules = {"num_sms": gpu.num_sms}
    if problem.op == "lora_linear":
        return config.choose(m, k, n, r, 2, gpu.capability, **rules)
    if problem.op == "input_gradient":
        several = problem.num_slots > 0
        return train_config.input_gradient(m, 2, False, problem.dropout, True, several, gpu.capability, False)
    if problem.op == "grouped_lora_linear":
        return grouped_config.choose(m, k, problem.widths, r, 2, gpu.capability, keep_h=problem.train, **rules)
    if problem.op in ("multi_lora_linear", "lora_shrink", "lora_expand_"):
        found = multi_config.choose(m, k, n, r, problem.num_slots, 2, gpu.capability, **rules)
        return {"lora_shrink": found.shrink, "lora_expand_": found.expand}.get(problem.op, found)
    return None


def test_without_a_gpu_it_says_so(capsys):
    if run.problem() is None:
        pytest.skip("this machine has a GPU: it would be measured")
    assert run.main([]) == 2
    assert "lora_kernels tune: needs a GPU on which the Triton kernels run: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--shape", "4096"], ["--shape", "0x4"], ["--tokens", "0"], ["--slots", "0"], ["--seconds", "0"],
     ["--budget", "-1"], ["--group", "4x"], ["--group", "4x4,0"], ["--dtype", "int8"], ["--op", "lora_linear", "sort"]],
)  # fmt: skip
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        run.main(arguments)
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("op", tuning.OPS)
def test_candidates_are_of_the_op_start_with_the_rule_and_fit_the_shared_memory(op, capability):
    gpu = GPUS[capability]
    for problem in problems([op], run.SHAPES, run.TOKENS, (16, 64, 200), run.SLOTS, run.GROUPS):
        found = candidates(problem, gpu)
        assert len(found) == len(set(found)) > 1
        assert all(type(tiles) is tuning.OPS[op] for tiles in found)
        assert _rule(problem, gpu) in (None, found[0])
        assert all(shared_bytes(problem, tiles) <= gpu.shared_limit for tiles in found)
        if op == "lora_linear":
            assert config.VENDOR in found
            assert all(config.takes(tiles, problem.num_tokens, problem.rank) for tiles in found)
        if op == "grouped_lora_linear":
            takes = (problem.num_tokens, problem.rank, problem.train)
            assert all(grouped_config.takes(tiles, *takes) and tiles.split_k == 1 for tiles in found)


def test_less_shared_memory_leaves_fewer_candidates():
    problem = Problem("lora_linear", 8192, 4096, 4096, 16)
    less = dataclasses.replace(GPUS[9, 0], shared_limit=101376)
    dropped = set(candidates(problem, GPUS[9, 0])) - set(candidates(problem, less))
    assert config.Config("two_pass", 128, 256, 64, 8, 4, tma=True) in dropped
    assert config.Config("two_pass", 128, 128, 64, 8, 2, tma=True) not in dropped


@pytest.mark.parametrize(
    ("case", "kernel", "problem"),
    [("lora_linear bf16 M8192 r16", "two_pass_kernel", Problem("lora_linear", 8192, 4096, 4096, 16)),
     ("lora_linear bf16 M1 r16", "decode_kernel", Problem("lora_linear", 1, 4096, 4096, 16)),
     ("lora_linear bf16 M200 r16", "one_pass_kernel", Problem("lora_linear", 200, 4096, 4096, 16))],
)  # fmt: skip
def test_the_estimate_of_shared_memory_is_what_the_compiler_took(case, kernel, problem):
    records = json.loads(TABLE.read_text())["records"]
    taken = {r["shared"] for r in records if (r["case"], r["kernel"], r["arch"]) == (case, kernel, 90)}
    estimate = shared_bytes(problem, _rule(problem, GPUS[9, 0]))
    assert {abs(shared - estimate) <= 1024 for shared in taken} == {True}


class FakeCall:
    """Takes the seconds that a table says for the configuration on trial; some can not run."""

    copies = 2

    def __init__(self, op, seconds):
        self.op, self.seconds = op, seconds

    def run(self):
        taken = self.seconds[tuning.measured(self.op, "none", M=1)]
        if isinstance(taken, str):
            raise ValueError(taken)

    def timer(self, runs, copies, *, seconds):
        return {config: self.seconds[config] for config in runs}


def test_the_fastest_is_kept_and_what_can_not_run_is_skipped():
    rule, fast, broken = (config.Config("one_pass", m, 64, 64, 4, 3) for m in (16, 32, 64))
    call = FakeCall("lora_linear", {rule: 3.0, fast: 2.0, broken: "too much\nshared memory"})
    found = run.fastest(call, "lora_linear", [rule, broken, fast], call.timer, 1.0)
    assert (found.best, found.seconds, found.by_rule) == (fast, 2.0, 3.0)
    assert found.skipped == {broken: "ValueError: too much"}
    assert tuning._trial is None
    call.seconds[rule] = "neither"
    assert run.fastest(call, "lora_linear", [rule, broken, fast], call.timer, 1.0).by_rule is None
    with pytest.raises(RuntimeError, match="none of 2 configurations could run: ValueError: neither"):
        run.fastest(call, "lora_linear", [rule, broken], call.timer, 1.0)


class Asked(dict):
    """Stands for the configurations of an op: holds what was asked for."""

    def get(self, key, default=None):
        self[key] = True
        return default

    def __bool__(self):
        return True


@pytest.mark.parametrize("op", tuning.OPS)
def test_a_launcher_asks_for_the_key_that_is_written(op, device, monkeypatch):
    asked = Asked()
    monkeypatch.setattr(tuning, "_of_gpu", lambda gpu: {op: asked})
    for problem in problems([op], [(64, 48)], [20], [5], [3], [(64, (48, 16))]):
        call = calls.call_of(problem, torch.float16, device)
        call.run()
        assert problem.key in asked
        assert call.copies > 1


@pytest.fixture
def at_hand(monkeypatch, tmp_path, device):
    """A GPU for ``main``: the interpreter, timed by a number for each configuration, of which some can not run."""
    if device != "cpu":
        pytest.skip("overwrites the name of the GPU")
    monkeypatch.setattr(run, "problem", lambda: None)
    monkeypatch.setattr(run, "gpu_at_hand", lambda: (SMALL, "cpu"))
    monkeypatch.setattr(run, "candidates", lambda problem, gpu: candidates(problem, gpu)[:2])
    monkeypatch.setattr("lora_kernels.bench.cuda_timing.interleaved", _last_is_fastest)
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tuning._of_gpu.cache_clear()
    yield tuning.file_of("interpreter")
    tuning._of_gpu.cache_clear()


def _last_is_fastest(runs, copies, *, seconds):
    return {name: 1.0 / (1 + index) for index, name in enumerate(runs)}


_SHORT = [
    "--shape",
    "64x48",
    "--group",
    "64x48,16",
    "--tokens",
    "5",
    "--rank",
    "4",
    "--slots",
    "2",
    "--dtype",
    "float16",
]


def test_a_run_writes_what_calls_then_take(at_hand, capsys):
    """Every op, in the interpreter; a second run measures nothing, and one with --again everything."""
    assert run.main(_SHORT) == 0
    text = capsys.readouterr()
    written = tuning.read(at_hand, "interpreter")
    assert written.keys() == tuning.OPS.keys()
    for problem in problems(tuning.OPS, [(64, 48)], [5], [4], [2], [(64, (48, 16))]):
        best = written[problem.op][problem.key]
        assert best == candidates(problem, SMALL)[1]
        assert tuning.measured(problem.op, "interpreter", **problem.sizes) == best
        assert f"{problem.op} {problem.key}" in text.out
    assert "2.00 x its rule" in text.out
    count = sum(map(len, written.values()))
    assert f"tune: {count} shapes in " in text.err
    before = at_hand.stat().st_mtime_ns
    assert run.main([*_SHORT, "--quiet"]) == 0
    text = capsys.readouterr()
    assert f"{count} of {count} shapes were measured before" in text.out
    assert text.err == ""
    assert at_hand.stat().st_mtime_ns == before
    assert run.main([*_SHORT, "--again", "--op", "merge_"]) == 0
    assert at_hand.stat().st_mtime_ns > before
    assert tuning.read(at_hand, "interpreter").keys() == tuning.OPS.keys()


def test_an_interrupted_run_keeps_what_it_measured_and_goes_on(at_hand, monkeypatch, capsys):
    timed = []

    def interrupted(runs, copies, *, seconds):
        timed.append(1)
        if len(timed) == 2:
            raise KeyboardInterrupt
        return _last_is_fastest(runs, copies, seconds=seconds)

    monkeypatch.setattr("lora_kernels.bench.cuda_timing.interleaved", interrupted)
    command = [*_SHORT, "--op", "merge_", "switch_"]
    with pytest.raises(KeyboardInterrupt):
        run.main(command)
    assert tuning.read(at_hand, "interpreter").keys() == {"merge_"}
    assert run.main([*command, "--budget", "1e-9"]) == 0
    assert "out of time: 1 shapes are left" in capsys.readouterr().out
    assert run.main(command) == 0
    assert len(timed) == 3
    assert tuning.read(at_hand, "interpreter").keys() == {"merge_", "switch_"}


def test_a_shape_that_nothing_can_run_is_told_and_the_others_are_measured(at_hand, monkeypatch, capsys):
    real = calls.call_of

    def call_of(problem, dtype, device):
        if problem.op == "merge_":
            raise torch.cuda.OutOfMemoryError("out of memory")
        return real(problem, dtype, device)

    monkeypatch.setattr(calls, "call_of", call_of)
    assert run.main([*_SHORT, "--op", "merge_", "switch_"]) == 1
    assert "merge_ N48 K64 R16 B2: out of memory" in capsys.readouterr().err
    assert tuning.read(at_hand, "interpreter").keys() == {"switch_"}


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path, tiles = tmp_path / "gpu.json", config.Config("two_pass", 16, 16, 32, 4, 1)
    tuning.write(path, "gpu", {"lora_linear": {"M1": tiles}})
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tuning.write(path, "gpu", {})
    assert path.read_bytes() == before


_TILES = dataclasses.asdict(config.Config("two_pass", 16, 16, 32, 4, 1))


def _file(op, **values):
    return json.dumps({"gpu": "interpreter", "configs": {op: {"M1": values}}})


# What stands in a file, and what is said of it.
_FILES = {
    "{": "JSONDecodeError",
    "[]": "not a file of tuned configurations",
    json.dumps({"gpu": "interpreter"}): "configs",
    json.dumps({"gpu": "NVIDIA L4", "configs": {}}): "expected the configurations of 'interpreter', got .*'NVIDIA L4'",
    _file("sort", **_TILES): "op: expected one of .* got 'sort'",
    _file("lora_linear", path="decode"): "lora_linear M1: expected path, block_m.* got path",
    _file("lora_linear", **_TILES | {"block_m": "16"}): "lora_linear M1 block_m: expected int, got '16'",
    _file("lora_linear", **_TILES | {"path": "rm"}): "lora_linear M1 path: expected .* got 'rm'",
    _file(
        "multi_lora_linear", route="fused", base=3, shrink={}, expand={}
    ): "multi_lora_linear M1 base: expected block_m.* got 3",
}


@pytest.mark.parametrize("text", _FILES)
def test_a_file_that_is_not_of_this_gpu_is_refused_by_name(text, at_hand, capsys):
    at_hand.write_text(text)
    with pytest.raises(ValueError, match=_FILES[text]) as error:
        tuning.read(at_hand, "interpreter")
    assert str(at_hand) in str(error.value)
    assert run.main(_SHORT) == 2
    assert str(at_hand) in capsys.readouterr().err
    assert at_hand.read_text() == text
    case = make_linear(5, 64, 32, 4, torch.float16)
    with pytest.raises(ValueError, match=r"interpreter\.json"):
        triton_linear.lora_linear(*case.args(), None, False)


def test_what_a_file_says_is_taken_only_where_it_holds_the_call(at_hand):
    """Not under batch_invariant, not for two dtypes, and never a path that is too small for the rows or the rank."""
    sizes = {"K": 64, "N": 32, "B": 2}
    chosen = config.Config("two_pass", 16, 16, 32, 4, 1)
    small = config.Config("decode", 4, 16, 32, 4, 1)
    keys = {tuning.key(M=5, **{"K": 64, "N": 32, "R": 4, "B": 2}): chosen}
    keys |= {tuning.key(M=9, **{"K": 64, "N": 32, "R": 4, "B": 2}): small}
    keys |= {tuning.key(M=3, **{"K": 64, "N": 32, "R": 100, "B": 2}): small}
    tuning.write(at_hand, "interpreter", {"lora_linear": keys})

    def taken(rows, rank, adapter=torch.float16, invariant=False):
        case = make_linear(rows, sizes["K"], sizes["N"], rank, torch.float16, adapter)
        return triton_linear.config_of(case.x, case.weight, case.lora_a, case.lora_b, invariant)

    assert taken(5, 4) == taken(8, 16) == chosen
    assert taken(5, 4, invariant=True) != chosen
    assert taken(5, 4, torch.float32) != chosen
    assert taken(5, 17) != chosen
    assert taken(9, 4) != small
    assert taken(3, 100) != small


def test_keys_and_names():
    assert tuning.key(M=100, K=4096, R=5, L=9, C=70) == "M128 K4096 R16 L16 C128"
    # A rank past 64 is a key of its own: paths that hold 64 must not be found for it.
    assert len({tuning.key(R=rank) for rank in (64, 65, 129, 512)}) == 4
    assert tuning.file_of("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"
