"""A merge that is killed, runs out of disk or is interrupted continues, and never looks complete before it is."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from disk_cases import llama, mixture, save_adapter, save_base

import lora_kernels
from lora_kernels.disk import merge, merge_checkpoint, stream
from lora_kernels.io.checkpoint import CheckpointError

SMALL = {"quiet": True, "block_bytes": 512, "sync_bytes": 3000}


@pytest.fixture
def job(tmp_path):
    save_base(llama(torch.bfloat16), tmp_path / "base")
    save_adapter(llama, tmp_path / "a", target_modules=["q_proj", "down_proj", "embed_tokens"], r=4)
    merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "wanted", **SMALL)
    return tmp_path


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments(job, seed):
    driver = Path(__file__).with_name("kill_driver.py")
    arguments = [str(job / name) for name in ("base", "a", "out", "wanted")]
    root = str(Path(lora_kernels.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(driver), *arguments, str(seed), "25"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["continued"] >= 3


def fail_after(monkeypatch, count, error):
    """The ``count``-th write of an edited block raises."""
    calls, write = [], stream.write_exactly

    def failing(*arguments):
        calls.append(1)
        if len(calls) == count:
            raise error
        write(*arguments)

    monkeypatch.setattr(stream, "write_exactly", failing)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("count", [1, 7, 30, 60])
def test_continues_where_it_was(job, monkeypatch, count, error):
    out = job / "out"
    with monkeypatch.context() as patch:
        fail_after(patch, count, error)
        with pytest.raises(type(error)):
            merge_checkpoint(job / "base", [job / "a"], out, **SMALL)
    assert not out.exists()
    written = []
    write = stream.write_exactly
    monkeypatch.setattr(stream, "write_exactly", lambda *a: (written.append(1), write(*a)))
    merge_checkpoint(job / "base", [job / "a"], out, **SMALL)
    assert contents(out) == contents(job / "wanted")
    if count == 60:
        total = len(written)
        del written[:]
        merge_checkpoint(job / "base", [job / "a"], job / "again", **SMALL)
        assert total < len(written) - 20


EXPERTS = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
START = {"target_modules": ["q_proj", "o_proj"], "init_lora_weights": "pissa"}


@pytest.mark.parametrize("count", [9, 30])
@pytest.mark.parametrize("options", [EXPERTS, START], ids=["experts", "pissa"])
def test_experts_and_what_was_taken_out_continue(options, count, tmp_path, monkeypatch):
    def make(dtype):
        return mixture("gpt_oss", dtype)

    save_base(make(torch.bfloat16), tmp_path / "base")
    save_adapter(make, tmp_path / "a", r=4, **options)
    small = {**SMALL, "block_bytes": 64}
    merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "wanted", **small)
    with monkeypatch.context() as patch:
        fail_after(patch, count, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", **small)
    if options is START:  # a decomposition by other threads has other bits
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda: 77)
            with pytest.raises(CheckpointError, match="other files, weights or options"):
                merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", **small)
    merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", verify=True, **small)
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


def test_unfinished_merge_of_something_else_is_left_alone(job, monkeypatch):
    with monkeypatch.context() as patch:
        fail_after(patch, 20, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(job / "base", [job / "a"], job / "out", **SMALL)
    before = contents(job / "out.partial")
    with pytest.raises(CheckpointError, match="other files, weights or options"):
        merge_checkpoint(job / "base", [job / "a"], job / "out", weights=[2.0], **SMALL)
    assert contents(job / "out.partial") == before


def test_killed_between_last_steps(job, monkeypatch):
    for step in ("before", "after"):
        rename = os.rename
        out = job / f"out_{step}"

        def killed(source, target, step=step, rename=rename):
            if step == "after":
                rename(source, target)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                merge_checkpoint(job / "base", [job / "a"], out, **SMALL)
        merge_checkpoint(job / "base", [job / "a"], out, **SMALL)
        assert contents(out) == contents(job / "wanted")
        assert not list(job.glob("out*.partial*"))


def test_a_torn_line_of_the_journal_is_ignored(job, monkeypatch):
    with monkeypatch.context() as patch:
        fail_after(patch, 60, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(job / "base", [job / "a"], job / "out", **SMALL)
    with open(job / "out.partial.jsonl", "ab") as file:
        file.write(b'{"file": "model-0000')
    merge_checkpoint(job / "base", [job / "a"], job / "out", **SMALL)
    assert contents(job / "out") == contents(job / "wanted")


DAMAGED = [b"\0\0\0\n", b"5\n", b'{"file": "model-00001-of-00004.safetensors"}\n', b'{"file": "x", "bytes": -5}\n']


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_of_the_journal_ends_it(job, monkeypatch, line):
    with monkeypatch.context() as patch:
        fail_after(patch, 60, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(job / "base", [job / "a"], job / "out", **SMALL)
    path = job / "out.partial.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    merge_checkpoint(job / "base", [job / "a"], job / "out", **SMALL)
    assert contents(job / "out") == contents(job / "wanted")
    (job / "again.partial.jsonl").write_bytes(line)
    with pytest.raises(CheckpointError, match=r"again.partial.jsonl is damaged: delete it"):
        merge_checkpoint(job / "base", [job / "a"], job / "again", **SMALL)


def test_a_config_that_changed_meanwhile(job, monkeypatch):
    with monkeypatch.context() as patch:
        fail_after(patch, 20, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(job / "base", [job / "a"], job / "out", **SMALL)
    path = job / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "gpt_oss"}))
    with pytest.raises(CheckpointError, match="other files, weights or options"):
        merge_checkpoint(job / "base", [job / "a"], job / "out", **SMALL)


def test_another_merge_that_ends_between_the_checks_and_the_lock(job, monkeypatch):
    def journal(*arguments, make=merge.Journal):
        with monkeypatch.context() as patch:
            patch.setattr(merge, "Journal", make)
            merge_checkpoint(job / "base", [job / "a"], job / "out", **SMALL)
        return make(*arguments)

    monkeypatch.setattr(merge, "Journal", journal)
    with pytest.raises(CheckpointError, match="out is not empty"):
        merge_checkpoint(job / "base", [job / "a"], job / "out", **SMALL)
    assert contents(job / "out") == contents(job / "wanted")
    assert not list(job.glob("out.partial*"))


def test_another_merge_that_ends_while_its_journal_is_opened(job, monkeypatch):
    lock, removed = fcntl.flock, []

    def removing(*arguments):
        if not removed:
            removed.append(os.unlink(job / "out.partial.jsonl"))
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", removing)
    merge_checkpoint(job / "base", [job / "a"], job / "out", **SMALL)
    assert contents(job / "out") == contents(job / "wanted")
    assert not list(job.glob("out.partial*"))


def test_links_as_the_output_and_as_files(job):
    """The base as the Hub's cache has it; OUT a link to a folder that is empty, or not there yet."""
    (job / "cache").mkdir()
    for path in (job / "base").iterdir():
        (job / "cache" / path.name).symlink_to(path)
    (job / "cache" / "gone.json").symlink_to(job / "nowhere.json")
    (job / "empty").mkdir()
    for name, target in (("a link", "empty"), ("another", "not yet")):
        (job / name).symlink_to(job / target)
        merge_checkpoint(job / "cache", [job / "a"], job / name, **SMALL)
        assert contents(job / target) == contents(job / name) == contents(job / "wanted")
        assert not any(path.is_symlink() for path in (job / target).iterdir())


def test_verify_finds_a_changed_byte(job, monkeypatch):
    write, calls = stream.write_exactly, []

    def flipping(handle, view, offset):
        calls.append(1)
        data = bytearray(view)
        if len(calls) == 9:
            data[0] ^= 1
        write(handle, memoryview(data), offset)

    monkeypatch.setattr(stream, "write_exactly", flipping)
    with pytest.raises(CheckpointError, match="verify: "):
        merge_checkpoint(job / "base", [job / "a"], job / "out", verify=True, **SMALL)
    assert not list(job.glob("out*"))


def test_full_disk_is_refused_first(job, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"bytes are needed .* 1,000 are free"):
        merge_checkpoint(job / "base", [job / "a"], job / "out", **SMALL)
    assert not list(job.glob("out*"))
