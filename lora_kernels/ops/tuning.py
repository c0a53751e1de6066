"""Tile configurations that were measured on a GPU: where they are kept, how they are read, which one a call takes.

``python -m lora_kernels tune`` writes ``tuned/<GPU>.json``: ``{"gpu": name, "configs": {op: {key: fields}}}``. A
launcher asks :func:`measured` before its rule; a key names the sizes that a rule would see, rows and slots rounded up
to powers of two. Plain Python: nothing of Triton is imported.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
from pathlib import Path

from .linear import config as linear
from .linear import train_config
from .merge import config as merge
from .multi import config as multi

TUNED = Path(__file__).parent / "tuned"
# What is tuned, and what a configuration of it is. ``input_gradient`` and ``skinny`` are the GEMMs of backward.
OPS = {
    "lora_linear": linear.Config,
    "multi_lora_linear": multi.Config,
    "lora_shrink": multi.Tiles,
    "lora_expand_": multi.Tiles,
    "input_gradient": linear.Config,
    "skinny": train_config.SkinnyConfig,
    "grouped_lora_linear": linear.Config,
    "merge_": merge.Tiles,
    "switch_": merge.Tiles,
}
# The words that a field of text may hold.
WORDS = {
    "lora_linear": ("decode", "one_pass", "two_pass", "vendor"),
    "multi_lora_linear": ("decode", "fused", "vendor"),
    "input_gradient": ("dx",),
    "grouped_lora_linear": ("decode", "two_pass", "apart"),
}
_trial = None  # (op, configuration) while ``tune`` measures


def power_of_two(number, least=1):
    return max(least, 1 << max(0, number - 1).bit_length())


def key(**sizes):
    """Key of a call in a file: ``key(M=100, K=64)`` is ``"M128 K64"``. Of M (rows), L (slots), R (rank) and C (columns
    of h) the next power of two counts; no slots, "L0", are one adapter for all rows."""
    rounded = {"M": 1, "L": 1, "R": 16, "C": 16}
    names = {n: power_of_two(v, rounded[n]) if n in rounded and v else v for n, v in sizes.items()}
    return " ".join(f"{name}{value}" for name, value in names.items())


def file_of(gpu):
    """The file of a GPU by its name, whether it exists or not."""
    return TUNED / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def read(path, gpu):
    """``{op: {key: configuration}}`` of a file.

    Raises:
        ValueError: the file is not one of ours, or of another GPU; the message names it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        name, configs = found["gpu"], found["configs"]
        known = {op: {k: _parsed(op, f"{op} {k}", v) for k, v in each.items()} for op, each in configs.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not a file of tuned configurations ({what}); remove it and tune again") from error
    if name != gpu:
        raise ValueError(f"{path}: expected the configurations of {gpu!r}, got those of {name!r}")
    return known


def _parsed(op, place, values, kind=None):
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    kind = kind or OPS[op]
    fields, parsed = {field.name: field.type for field in dataclasses.fields(kind)}, {}
    if not isinstance(values, dict) or values.keys() != fields.keys():
        got = ", ".join(values) if isinstance(values, dict) else repr(values)
        raise ValueError(f"{place}: expected {', '.join(fields)}, got {got}")
    for name, value in values.items():
        expected = fields[name]
        if dataclasses.is_dataclass(expected):
            value = _parsed(op, f"{place} {name}", value, expected)
        elif type(value) is not expected or (expected is str and value not in WORDS[op]):
            raise ValueError(f"{place} {name}: expected {_meant(op, expected)}, got {value!r}")
        parsed[name] = value
    return kind(**parsed)


def _meant(op, kind):
    return " or ".join(WORDS[op]) if kind is str else kind.__name__


def write(path, gpu, configs):
    """Writes ``{op: {key: configuration}}``, whole or not at all; calls of this process take it from then on."""
    texts = {op: {k: dataclasses.asdict(each[k]) for k in sorted(each)} for op, each in sorted(configs.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"gpu": gpu, "configs": texts}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    _of_gpu.cache_clear()


@functools.cache
def _of_gpu(gpu):
    path = file_of(gpu)
    return read(path, gpu) if path.is_file() else {}


def measured(op, gpu, **sizes):
    """The configuration measured for these sizes on this GPU; None where none was."""
    if _trial is not None and _trial[0] == op:
        return _trial[1]
    configs = _of_gpu(gpu).get(op)
    return configs.get(key(**sizes)) if configs else None


@contextlib.contextmanager
def trial(op, config):
    """In the block every call of the op that could be tuned takes this configuration."""
    global _trial
    before, _trial = _trial, (op, config)
    try:
        yield
    finally:
        _trial = before
