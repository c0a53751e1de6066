"""Which optional packages are installed: the questions of ``peft.import_utils``."""

import importlib.metadata
import importlib.util


def is_bnb_available():
    """Whether bitsandbytes is installed."""
    return _installed("bitsandbytes")


def is_bnb_4bit_available():
    """Whether bitsandbytes is installed, and has 4-bit layers."""
    return is_bnb_available() and hasattr(importlib.import_module("bitsandbytes").nn, "Linear4bit")


def is_diffusers_available():
    """Whether diffusers is installed."""
    return _installed("diffusers")


def is_optimum_available():
    """Whether optimum is installed."""
    return _installed("optimum")


def is_torchao_available():
    """Whether torchao is installed."""
    return _installed("torchao")


def is_transformers_ge(version):
    """Whether transformers is installed, in ``version`` ("5.1") or a later one."""
    if not _installed("transformers"):
        return False
    have = importlib.metadata.version("transformers").split(".")
    numbers = [int(part) for part in have[:3] if part.isdigit()]
    return numbers >= [int(part) for part in version.split(".")]


def is_xpu_available(check_device=False):
    """Whether torch has an Intel accelerator."""
    import torch

    return hasattr(torch, "xpu") and torch.xpu.is_available()


def _installed(name):
    return importlib.util.find_spec(name) is not None


is_transformers_ge_v5 = is_transformers_ge("5.0")

__all__ = [
    "is_bnb_4bit_available",
    "is_bnb_available",
    "is_diffusers_available",
    "is_optimum_available",
    "is_torchao_available",
    "is_transformers_ge",
    "is_transformers_ge_v5",
    "is_xpu_available",
]
