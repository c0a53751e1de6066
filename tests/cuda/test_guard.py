"""The CUDA kernels touch nothing beside their tensors: run on the host, where pages without access surround them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import ROOT

pytestmark = pytest.mark.usefixtures("library")


def _driver(*options):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, Path(__file__).with_name("guard_driver.py"), *options]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


def test_nothing_beside_the_tensors_is_touched():
    done = _driver()
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    assert "touched nothing else" in done.stdout


def test_what_is_touched_is_found():
    assert _driver("probe").returncode < 0
