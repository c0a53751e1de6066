"""``in_turn``: forwards that change their module for the time of a call run in one thread at a time."""

import contextlib
import threading

import torch

_turn = threading.RLock()  # a module that calls itself, or another of the kind, goes on


def in_turn():
    """A context for one thread at a time; what is compiled has no threads to keep apart while it is traced."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _turn
