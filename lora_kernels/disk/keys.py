"""From an adapter's names to a checkpoint's.

A name is looked up, in this order: as it is; with a prefix more or less on one side; without the names of wrapping
modules on both sides; the same under the names that transformers 4 had; as a part of a fused projection, or the fusion
of split ones. The first of these that finds anything must find one tensor: two are an error. A prefix that holds a
layer's index is never skipped.
"""

import difflib
from dataclasses import dataclass

from ..io.checkpoint import CheckpointError
from .older import older_names

_WRAPPERS = {"base_model", "model", "transformer", "language_model", "module", "_orig_mod"}
# Fused projections whose rows are those of their parts, one part after the other. (query_key_value, Wqkv, c_attn
# and in_proj interleave heads or differ between models: refused.)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class KeyMatchError(CheckpointError):
    """A key that names no tensor of the checkpoint, or more than one."""


@dataclass
class Slice:
    """``rows`` rows of a tensor from ``row``; they take the update's rows from ``source_row``. ``whole``: no part."""

    tensor: str
    row: int
    rows: int
    source_row: int
    whole: bool = False


class Keys:
    """The tensor names of a checkpoint, ready to be searched."""

    def __init__(self, tensors):
        self.tensors = tensors
        self._by_last, self._bare = {}, {}
        for name in tensors:
            self._by_last.setdefault(_tail(name), []).append(name)
            self._bare.setdefault(_unwrapped(name), []).append(name)

    def find(self, name):
        """The tensor that ``name`` means, or None.

        Raises:
            KeyMatchError: several tensors match.
        """
        tries = (self._find(each) for each in (name, *older_names(name)))
        return next((found for found in tries if found is not None), None)

    def _find(self, name):
        if name in self.tensors:
            return name
        longer = [t for t in self._by_last.get(_tail(name), ()) if _is_prefix_of_wrapper(t, name)]
        for found in (longer, self._bare.get(_unwrapped(name), [])):
            if len(found) > 1:
                raise KeyMatchError(f"'{name}' matches several tensors: {', '.join(sorted(found)[:4])}")
            if found:
                return found[0]
        return None

    def find_slices(self, path, rows, sibling_rows, kind="weight"):
        """Where rows of module ``path`` go, (out, in) weights: a list of :class:`Slice`, empty if nowhere.

        Args:
            rows: their number, of the module's ``lora_B`` or of what it has saved in full.
            sibling_rows: module path -> such rows, for all modules of the adapter.
            kind: "weight" or "bias".
        """
        parent, _, last = path.rpartition(".")
        head = parent + "." if parent else ""
        for fused, parts in FUSED.items():
            if last == fused:
                return self._split(head, path, parts, rows, kind)
            if last in parts:
                return self._part(head, path, fused, parts, rows, sibling_rows, kind)
        return []

    def _split(self, head, path, parts, rows, kind):
        found = [self.find(f"{head}{part}.{kind}") for part in parts]
        if None in found:
            return []
        sizes = [self.tensors[name].matrix[0] for name in found]
        if sum(sizes) != rows:
            raise KeyMatchError(f"'{path}' is {' + '.join(found)} of {sizes} rows in the checkpoint, not "
                                f"{rows}")  # fmt: skip
        return [Slice(name, 0, size, sum(sizes[:i])) for i, (name, size) in enumerate(zip(found, sizes))]

    def _part(self, head, path, fused, parts, rows, sibling_rows, kind):
        name = self.find(f"{head}{fused}.{kind}")
        if name is None:
            return []
        total, place = self.tensors[name].matrix[0], parts.index(path.rpartition(".")[2])
        given = [sibling_rows.get(head + part) for part in parts]
        if len(parts) == 3:  # keys and values have the same number of heads
            kv = next((g for g in given[1:] if g is not None), None)
            kv = (total - given[0]) // 2 if kv is None else kv
            sizes = [total - 2 * kv, kv, kv]
        else:
            sizes = [total // 2, total // 2]
        if sum(sizes) != total or any(g is not None and g != s for g, s in zip(given, sizes)) or min(sizes) <= 0:
            raise KeyMatchError(f"'{path}': its {rows} rows do not fit {name} as "
                                f"[{'; '.join(parts)}] of {total} rows")  # fmt: skip
        return [Slice(name, sum(sizes[:place]), rows, 0)]

    def nearest(self, name, count=3):
        """The closest tensor names, for an error message."""
        last = name.split(".")[-2:]
        pool = [t for t in self.tensors if set(last) & set(t.split(".")[-2:])] or list(self.tensors)
        pool = sorted(pool, key=lambda t: -_shared_tail(name, t))[:400]
        return difflib.get_close_matches(name, pool, count, 0.0)


def _tail(name):
    return ".".join(name.split(".")[-2:])


def _shared_tail(left, right):
    count = 0
    for a, b in zip(reversed(left.split(".")), reversed(right.split("."))):
        if a != b:
            break
        count += 1
    return count


def _is_prefix_of_wrapper(left, right):
    """One name is the other behind a prefix, and the prefix names no layer by its index."""
    long, short = (left, right) if len(left) > len(right) else (right, left)
    if not long.endswith("." + short) or short.count(".") == 0:
        return False
    return not any(part.isdigit() for part in long[: -len(short) - 1].split("."))


def _unwrapped(name):
    parts = name.split(".")
    while len(parts) > 2 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)
