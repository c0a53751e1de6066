"""Merging adapters into checkpoints on disk, and looking into adapters: no model is built, no GPU is needed.

``base.py`` and ``adapter.py`` read the two sides, ``keys.py`` (``older.py``: names that were) and ``places.py`` match
their names, ``plan.py`` says what happens to which bytes (``parameters.py``: of bare parameters), ``edit.py`` does it
to a block (``start.py``: what an adapter took out of the weight), ``stream.py`` writes the shards, ``journal.py`` makes
a killed run continue, ``verify.py`` checks, ``cli.py`` is the command.
"""

from .merge import merge_checkpoint

__all__ = ["merge_checkpoint"]
