"""Serving: adapters resident in slots, and batches in which each row names its own."""

from .pool import AdapterPool

__all__ = ["AdapterPool"]
