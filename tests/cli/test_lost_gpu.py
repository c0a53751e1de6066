"""What a failure that takes the GPU with it does to the tests that are left, with a stand-in for torch; and tests that
go on where they stopped."""

import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parents[1]
_CONFTEST = f"""
import sys, types
sys.path.append({str(TESTS)!r})
from lost_gpu import pytest_runtest_makereport
from resumed import *

lost = []

def synchronize():
    if lost:
        raise RuntimeError("an illegal memory access was encountered")

sys.modules["torch"] = types.SimpleNamespace(
    lost=lost, cuda=types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
)
"""
_TESTS = """
import sys

def test_wrong_bits():
    assert 1 == 2

def test_illegal():
    sys.modules["torch"].lost.append(1)
    assert "of which kernel" == ""

def test_last():
    sys.modules["torch"].cuda.synchronize()
"""


def _run(folder, *words):
    (folder / "conftest.py").write_text(_CONFTEST)
    (folder / "test_them.py").write_text(_TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *words, "test_them.py"]
    # The process that runs this test may itself be a worker.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["LORA_KERNELS_PASSED"] = "passed"
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_the_process_ends_and_another_runs_what_is_left(tmp_path):
    pytest.importorskip("xdist")
    run = _run(tmp_path, "-n", "1")
    assert "worker 'gw0' crashed while running 'test_them.py::test_illegal'" in run.stdout
    assert "2 failed, 1 passed" in run.stdout
    assert "test_them.py::test_illegal lost the GPU" in run.stderr
    assert "of which kernel" in run.stderr


def test_a_single_process_stops_there(tmp_path):
    run = _run(tmp_path, "-p", "no:xdist")
    assert run.returncode == 1
    assert "test_illegal lost the GPU: an illegal memory access was encountered" in run.stdout
    assert "FAILED test_them.py::test_wrong_bits" in run.stdout


@pytest.mark.parametrize("workers", [("-p", "no:xdist"), ("-n", "1")])
def test_tests_that_passed_are_not_run_again(workers, tmp_path):
    if "-n" in workers:
        pytest.importorskip("xdist")
    words = (*workers, "--deselect", "test_them.py::test_illegal")
    assert "1 failed, 1 passed" in _run(tmp_path, *words).stdout
    assert (tmp_path / "passed").read_text() == "test_them.py::test_last\n"
    (tmp_path / "passed").rename(tmp_path / "passed.before")
    second = _run(tmp_path, *words).stdout
    assert "1 failed" in second
    assert "passed" not in second
    (tmp_path / "passed.before").write_text("test_them.py::test_last\ntest_them.py::test_wrong_bits\n")
    assert _run(tmp_path, *words).returncode == 0
