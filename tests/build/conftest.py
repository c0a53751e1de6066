"""One copy of the checkout, built once, and the environments to install it into."""

import sys
from pathlib import Path

import pytest
from build_helpers import OFFLINE, ROOT, SITE, Environment, build_in_place, copy_checkout


@pytest.fixture(scope="session")
def tools():
    """Skips, with the reason, where this environment cannot build anything."""
    sys.path.insert(0, str(ROOT))
    from build_support import toolchain

    missing = [name for name in ("cmake", "ninja") if not toolchain.find_tool(name)]
    missing += [] if toolchain.find_cxx() else ["a C++ compiler"]
    missing += [name for name in ("pip", "setuptools", "wheel") if not (SITE / name).is_dir()]
    if missing:
        pytest.skip(f"no build can be tried here without {', '.join(missing)}")


@pytest.fixture(scope="session")
def built_checkout(tools, tmp_path_factory) -> Path:
    """One built copy for all tests; each leaves it in a state that builds."""
    checkout = copy_checkout(tmp_path_factory.mktemp("built") / "checkout")
    build_in_place(checkout, LORA_KERNELS_BUILD="cpu")
    return checkout


@pytest.fixture
def fresh_checkout(tools, tmp_path) -> Path:
    return copy_checkout(tmp_path / "checkout")


@pytest.fixture
def environment(tools, tmp_path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture
def make_wheel(environment, tmp_path):
    """A function that builds a checkout's wheel and returns its path and the output."""

    def make(checkout: Path, **variables):
        output = environment.pip("wheel", "-v", *OFFLINE, "-w", tmp_path, ".", cwd=checkout, **variables)
        (wheel,) = tmp_path.glob("*.whl")
        return wheel, output

    return make
