"""The checkpoint that is merged into: safetensors files of a folder, and where each tensor lies in them.

A safetensors file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape and
offsets) and the tensors' bytes. Nothing but headers is read here.
"""

import glob
import json
import math
import os
import struct
from dataclasses import dataclass, field

import torch

from ..io.checkpoint import CheckpointError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of the others some are saved in full: the batches that a norm has seen, masks, positions.
DTYPES = {**FLOATS, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
              "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip
INDEX_SUFFIX = ".safetensors.index.json"
# Weights in other formats, or unmerged copies: they would contradict the merged files.
_OTHER_WEIGHTS = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data",
                  ".safetensors", ".safetensors.index.json", ".npz", ".tflite", ".ot")  # fmt: skip
_MAX_HEADER = 100_000_000


@dataclass
class TensorInfo:
    """One tensor of the checkpoint: bytes ``start`` to ``stop`` of the file ``shard``.

    ``stack``: matrices one below the other, not one matrix of long rows.
    """

    name: str
    dtype: str
    shape: tuple
    start: int
    stop: int
    shard: str
    stack: bool = False

    @property
    def nbytes(self):
        return self.stop - self.start

    @property
    def torch_dtype(self):
        return DTYPES.get(self.dtype)

    @property
    def is_floating(self):
        return self.dtype in FLOATS

    @property
    def matrix(self):
        """(rows, columns) of the tensor as stored, one row after the other."""
        lead = len(self.shape) - 1 if self.stack else 1
        return math.prod(self.shape[:lead]), math.prod(self.shape[lead:])


@dataclass
class Base:
    """``shards``: file name -> size in bytes. ``tensors``: name -> TensorInfo. ``sidecars``: files to copy.

    ``tied``, ``model_types``: what ``config.json`` says, if it is there.
    """

    directory: str
    shards: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)
    sidecars: list = field(default_factory=list)
    left_out: list = field(default_factory=list)
    tied: bool = False
    model_types: tuple = ()

    def path(self, name):
        return os.path.join(self.directory, name)

    @property
    def sidecar_bytes(self):
        return sum(os.path.getsize(self.path(name)) for name in self.sidecars)


def open_base(directory):
    """Reads the headers of the checkpoint in ``directory``.

    Raises:
        CheckpointError: no safetensors checkpoint there, or one that is incomplete or damaged.
    """
    directory = os.fspath(directory)
    if not os.path.isdir(directory):
        raise CheckpointError(f"BASE_DIR: no such folder: {directory}")
    names, index = _shard_names(directory)
    base = Base(directory)
    _read_config(base)
    for name in names:
        path = base.path(name)
        if not os.path.isfile(path):
            raise CheckpointError(f"BASE_DIR: the index names {name}, which is not there: an incomplete download?")
        base.shards[name] = os.path.getsize(path)
        for info in read_header(path, name):
            if info.name in base.tensors:
                raise CheckpointError(f"{path}: '{info.name}' is also in {base.tensors[info.name].shard}")
            base.tensors[info.name] = info
    weight_map = {} if index is None else _read_json(base.path(index)).get("weight_map", {})
    for tensor, shard in weight_map.items():
        if tensor not in base.tensors or base.tensors[tensor].shard != shard:
            raise CheckpointError(f"{base.path(index)}: names '{tensor}' in {shard}, which does not hold it")
    _list_sidecars(base, index)
    return base


def _shard_names(directory):
    """File names in a fixed order, and the index file (None for a single file)."""
    files = sorted(os.path.basename(p) for p in glob.glob(os.path.join(glob.escape(directory), "*.safetensors")))
    indices = sorted(os.path.basename(p) for p in glob.glob(os.path.join(glob.escape(directory), "*" + INDEX_SUFFIX)))
    if len(indices) > 1:
        raise CheckpointError(f"BASE_DIR: expected one index file in {directory}, got {', '.join(indices)}")
    if indices:
        weight_map = _read_json(os.path.join(directory, indices[0])).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{os.path.join(directory, indices[0])}: expected a 'weight_map' of file names")
        names = sorted(set(weight_map.values()))
        for name in names:
            if os.path.basename(name) != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{indices[0]}: expected names of safetensors files, got {name!r}")
        return names, indices[0]
    if "adapter_model.safetensors" in files:
        raise CheckpointError(f"BASE_DIR: {directory} holds an adapter, not a base checkpoint")
    if "model.safetensors" in files:
        return ["model.safetensors"], None
    if len(files) == 1:
        return files, None
    if files:
        raise CheckpointError(f"BASE_DIR: {len(files)} safetensors files and no index (*{INDEX_SUFFIX}) in {directory}")
    pickles = [f for f in sorted(os.listdir(directory)) if f.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        raise CheckpointError(
            f"BASE_DIR: only pickled weights ({', '.join(pickles[:3])}) in {directory}; PyTorch .bin checkpoints are "
            "not merged: save the model with safe_serialization=True first"
        )
    raise CheckpointError(f"BASE_DIR: no *.safetensors file in {directory}")


def read_header(path, shard):
    """The tensors of a safetensors file, in the order of their bytes; the header is checked against the file."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{path}: no safetensors file, or one that is cut short")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        infos = []
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
                raise ValueError(f"'{name}' is {entry}")
            infos.append(TensorInfo(name, dtype, shape, 8 + length + start, 8 + length + stop, shard))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its safetensors header can not be read ({error})") from error
    infos.sort(key=lambda info: (info.start, info.stop))
    position = 8 + length
    for info in infos:
        if info.start != position or info.stop < info.start:
            raise CheckpointError(f"{path}: the bytes of '{info.name}' do not follow those before it")
        rows, columns = info.matrix
        if info.dtype in ITEM_BYTES and info.nbytes != rows * columns * ITEM_BYTES[info.dtype]:
            raise CheckpointError(f"{path}: '{info.name}' {info.shape} {info.dtype} can not have {info.nbytes} bytes")
        position = info.stop
    if position != size:
        raise CheckpointError(f"{path}: expected {position} bytes, got {size}: cut short or damaged")
    return infos


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: can not be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return values


def _read_config(base):
    path = base.path("config.json")
    values = _read_json(path) if os.path.isfile(path) else {}
    text = values.get("text_config")
    text = text if isinstance(text, dict) else {}
    base.model_types = tuple(str(part["model_type"]) for part in (values, text) if "model_type" in part)
    nested = text.get("tie_word_embeddings")
    base.tied = bool(values.get("tie_word_embeddings", True if nested is None else nested))


def _list_sidecars(base, index):
    """Everything but weights is copied; a subfolder with weights of its own, and hidden files, are left out."""
    for name in sorted(os.listdir(base.directory)):
        path = base.path(name)
        if name in base.shards or name.startswith("."):
            continue
        if os.path.isdir(path):
            found = [os.path.join(folder, f) for folder, _, files in os.walk(path) for f in sorted(files)]
            relative = [os.path.relpath(f, base.directory) for f in found]
            if any(f.endswith(_OTHER_WEIGHTS) for f in relative):
                base.left_out.append(name + os.sep)
            else:
                base.sidecars += relative
        elif name != index and name.endswith(_OTHER_WEIGHTS):
            base.left_out.append(name)
        elif os.path.isfile(path):
            base.sidecars.append(name)
