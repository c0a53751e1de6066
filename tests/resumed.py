"""Tests that passed are not run again, so that ``bench/gpu.sh`` goes on with the others.

LORA_KERNELS_PASSED names a file to add to; the one beside it, ``.before``, holds the tests to leave out. That one stays
as it is while tests run: every process of pytest-xdist has to collect the same.
"""

import os
from pathlib import Path

import pytest


def _known():
    path = Path(os.environ["LORA_KERNELS_PASSED"] + ".before")
    return set(path.read_text().splitlines()) if path.is_file() else set()


def pytest_collection_modifyitems(config, items):
    known = _known()
    left_out = [item for item in items if item.nodeid in known]
    items[:] = [item for item in items if item.nodeid not in known]
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.environ["LORA_KERNELS_PASSED"], "a") as file:
            file.write(f"{report.nodeid}\n")


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and _known():
        session.exitstatus = pytest.ExitCode.OK
