"""A kernel that reads what is not there leaves its process without a GPU: no later test of it means anything."""

import os
import sys

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After a failure that cost the GPU the process ends: pytest-xdist starts another for the tests that are left."""
    report = yield
    torch = sys.modules.get("torch")
    if report.failed and torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception as error:
            if "PYTEST_XDIST_WORKER" not in os.environ:
                pytest.exit(f"{item.nodeid} lost the GPU: {error}", returncode=1)
            with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                print(f"\n{item.nodeid} lost the GPU\n{report.longreprtext}", file=sys.stderr, flush=True)
            os._exit(1)
    return report
