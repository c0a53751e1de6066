"""Adapters on disk, in PEFT's format."""
