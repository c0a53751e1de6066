"""``in_turn``: forwards that change their module for the time of a call run in one thread at a time."""

import contextlib
import threading
import weakref

import torch

_turns = weakref.WeakKeyDictionary()  # {module: its lock}; not on the module, which is copied and pickled
_guard = threading.Lock()


def in_turn(module):
    """A context for one thread at a time of ``module``, which may call itself in it.

    What is compiled has no threads to keep apart while it is traced.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    with _guard:
        if (turn := _turns.get(module)) is None:
            turn = _turns[module] = threading.RLock()
    return turn
