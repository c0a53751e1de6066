"""Shared by the tests of layers: no parameter is so small that its adapters take the short way."""

import pytest

from lora_kernels.layers import parameter


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(parameter, "SMALL", 0)
