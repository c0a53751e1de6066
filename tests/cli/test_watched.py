"""A process that hangs or dies is started again without what it was at, and its other results stay."""

import json
import sys

import pytest

from lora_kernels.bench import watched

# Does each item once, unless it is known as lost; what "hang", "die" and "raise" are, they do.
_WORK = """
import importlib.util, os, sys, time, types
from pathlib import Path

def lost():
    raise RuntimeError("an illegal memory access was encountered")

sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(synchronize=lost))
folder, source, *items = sys.argv[1:]
spec = importlib.util.spec_from_file_location("watched", source)
watched = importlib.util.module_from_spec(spec)
spec.loader.exec_module(watched)
notes = watched.Notes(Path(folder) / "notes.json")
for item in items:
    if item in notes.lost or (Path(folder) / item).exists():
        continue
    notes.at(item)
    if item == "hang":
        time.sleep(100)
    if item == "die":
        os.kill(os.getpid(), 9)
    if item == "raise":
        notes.leave_if_lost(ValueError("wrong\\nbits"))
    (Path(folder) / item).touch()
notes.at(None)
"""


def _command(folder, *items):
    return [sys.executable, "-c", _WORK, str(folder), watched.__file__, *items]


def test_what_hangs_or_dies_costs_nothing_else(tmp_path, capsys):
    items = ("one", "die", "two", "raise", "three", "hang", "four")
    assert watched.run(_command(tmp_path, *items), tmp_path / "notes.json", patience=2) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {"notes", "one", "two", "three", "four"}
    lost = json.loads((tmp_path / "notes.json").read_text())["lost"]
    assert lost == {
        "die": "the process ended with -9",
        "raise": "lost the GPU: ValueError: wrong",
        "hang": "no answer in 2 s",
    }
    assert "hang: no answer in 2 s; going on without it" in capsys.readouterr().out


def test_a_process_that_fails_before_it_begins_is_not_started_again(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    assert watched.run(command, tmp_path / "notes.json", patience=60) == 3


@pytest.mark.parametrize("times", [1, 2])
def test_what_is_at_work_whenever_the_run_is_ended_from_outside_is_left_out_in_the_end(times, tmp_path):
    notes = watched.Notes(tmp_path / "notes.json")
    notes.killed = {"one": times - 1}
    notes.write()
    notes.at("one")
    assert watched.run(_command(tmp_path, "one", "two"), notes.path, patience=60) == 0
    assert (tmp_path / "one").exists() == (times == 1)
    assert (tmp_path / "two").exists()
    lost = {"one": "was at work 2 times when the run was ended"}
    assert watched.Notes(notes.path).lost == ({} if times == 1 else lost)


def test_what_was_lost_is_forgotten_under_another_stack_alone(tmp_path):
    first = {"gpus": ("H100",), "commit": None}
    for stack, kept in ((first, False), (first, True), ({}, False)):
        notes = watched.Notes(tmp_path / "notes.json")
        notes.under(stack)
        assert ("one" in notes.lost) is kept
        notes.at("one")
        notes.lose("no answer")
