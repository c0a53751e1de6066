"""Which GPU kernels were shown right on the GPU at hand: a file that ``python -m lora_kernels check`` writes there.

``auto`` takes a GPU kernel only where a run on hardware has shown it right. The proof of one machine is
``proven/<GPU>.json``: the ops of each backend whose every check against float64 passed, and the stack that passed
them (GPU, torch, Triton, and a digest of the kernels). Under another stack it counts for nothing.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import re
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
BACKENDS = ("cuda", "triton")
NONE = dict.fromkeys(BACKENDS, frozenset())
HOW = "python -m lora_kernels check"


def folders():
    """Where proofs are looked for, the first that can be written being where they are written: inside the package, so
    that a checkout keeps its own, else the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return PACKAGE / "proven", Path(cache) / "lora_kernels" / "proven"


@functools.cache
def stack():
    """What a proof depends on beside the GPU: versions, and a digest of the Python and the compiled kernels and of the
    tiles that were tuned."""
    digest = hashlib.sha256()
    for path in [
        *sorted(PACKAGE.rglob("*.py")),
        *sorted(PACKAGE.glob("tuned/*.json")),
        PACKAGE.parent / "_ops_cuda.so",
    ]:
        if path.is_file():
            digest.update(path.read_bytes())
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {"torch": torch.__version__, "triton": triton, "kernels": digest.hexdigest()[:16]}


def name_of(index):
    """Name and compute capability of a GPU, which its proof is of."""
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} sm_{major}{minor}"


def _file(folder, gpu):
    return folder / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def read(gpu):
    """``{backend: names of ops}`` shown right on this GPU under the present stack; nothing where there is no proof, or
    one that can not be read."""
    for folder in folders():
        try:
            found = json.loads(_file(folder, gpu).read_text(encoding="utf-8"))
            if found["gpu"] == gpu and found["stack"] == stack():
                return {backend: frozenset(found["ops"].get(backend, ())) for backend in BACKENDS}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return NONE


def write(gpu, ops):
    """Writes ``{backend: names of ops}``, whole or not at all; the file. Takes effect at once.

    Raises:
        OSError: no folder can be written to.
    """
    text = json.dumps({"gpu": gpu, "stack": stack(), "ops": {b: sorted(names) for b, names in ops.items()}}, indent=1)
    *others, last = folders()
    for folder in (*others, last):
        path = _file(folder, gpu)
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError:
            if folder is last:
                raise
        else:
            of_device.cache_clear()
            return path


@functools.cache
def of_device(index):
    """:func:`read` of the GPU with this index."""
    return read(name_of(index))
