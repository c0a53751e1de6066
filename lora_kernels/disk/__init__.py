"""Merging adapters into checkpoints on disk, and looking into adapters: no model is built, no GPU is needed.

``base.py`` and ``adapter.py`` read the two sides, ``keys.py`` matches their names, ``plan.py`` says what happens to
which bytes, ``edit.py`` does it to a block, ``stream.py`` writes the shards, ``journal.py`` makes a killed run
continue, ``verify.py`` checks, ``cli.py`` is the command.
"""

from .merge import merge_checkpoint

__all__ = ["merge_checkpoint"]
