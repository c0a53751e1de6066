"""What the options of several commands share."""

import argparse
import os
import pathlib

import torch


def parser(command, description):
    """The parser of ``python -m lora_kernels command``, under the name that a user can type again."""
    return argparse.ArgumentParser(prog=f"python -m lora_kernels {command}", description=description)


def device(text):
    """A device of torch's that is here: ``cpu``, ``cuda`` or ``cuda:1``."""
    try:
        wanted = torch.device(text)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no CUDA device")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch finds {torch.cuda.device_count()} CUDA devices, got {text!r}")
    return text


def new_file(text):
    """A path that a file can be written to; its folders are made when it is."""
    path = pathlib.Path(text)
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, {text} is a folder")
    if not nearest.is_dir() or not os.access(path if path.exists() else nearest, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} can not be written")
    return path
