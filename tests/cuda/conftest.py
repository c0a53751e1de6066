"""The CUDA ops, run on the host: see ``emulated.py``."""

import emulated
import pytest


@pytest.fixture(scope="session")
def library():
    """The emulated library; skips, with the reason, where it can not be built."""
    reason = emulated.unavailable()
    if reason:
        pytest.skip(reason)
    return emulated.load()


@pytest.fixture(params=[(0, True), (1, False), (7, True)], ids=["in order", "late copies", "shuffled"])
def schedule(request, library):
    """Runs the test under several orders of the threads, copies landing at once or at the last moment."""
    library.lk_emulate_settings(*request.param)


@pytest.fixture
def set_order(library):
    """``set_order(seed, early)``: as ``schedule``, and the order of the blocks; afterwards they are in their own."""

    def set_order(seed, early):
        library.lk_emulate_settings(seed, early)
        library.lk_emulate_blocks(seed)

    yield set_order
    library.lk_emulate_blocks(0)
