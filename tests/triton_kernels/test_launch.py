"""Every kind of launch goes through Triton's own launcher, into a driver that runs nothing but knows what a GPU takes.

What the static gate compiles is thereby known to be launched: arguments that the launcher unpacks, tensor maps and
grids within the limits, launches linked where they should be.
"""

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Lines of ``launch_driver.py``, which ends at a launch that raises."""
    folder = str(tmp_path_factory.mktemp("driver"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder}
    command = [sys.executable, str(Path(__file__).with_name("launch_driver.py"))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return [line.split() for line in run.stdout.splitlines()]


def test_every_kind_of_launch_is_taken(output):
    kinds = collections.Counter((name, linked) for word, name, linked, *_ in filter(_is("kind"), output))
    launched = collections.Counter((name, linked) for _, name, linked in filter(_is("launched"), output))
    del launched["nothing_kernel", "0"]
    assert launched == kinds
    assert len({name for name, _ in kinds}) > 15
    assert {name for name, linked in kinds if linked == "1"} > {"two_pass_kernel", "sum_splits_kernel"}
    described = {name for _, name, _, how in filter(_is("kind"), output) if how == "descriptors"}
    assert described > {"two_pass_kernel", "dx_kernel"}


def test_what_a_gpu_refuses_is_an_error(output):
    """A grid and a tensor map that are just too much; what is just not is launched."""
    assert sum(line[:2] == ["launched", "nothing_kernel"] for line in output) == 1
    assert sum(map(_is("refused"), output)) == 2


def _is(word):
    return lambda line: line[:1] == [word]
