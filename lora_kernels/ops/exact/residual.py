"""``MergeResidual``: what an exact merge keeps, so that unmerging restores every bit. Format: docs/residual_format.md.

A header says what it belongs to (shape, dtype, arithmetic, a digest of the adapter); the body holds the bits.
"""

import hashlib
import os
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .reference import widen

VERSION = 1
ARITHMETIC = 1  # t = fl32(s·b); acc = fma(t, a, acc) ascending; u = fl32(w + acc); to nearest even
_MAGIC = b"LKXR"
_HEADER = struct.Struct("<4sHBBQQQ32s")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def adapter_digest(lora_a, lora_b, scaling):
    """SHA-256 of an adapter's values: float32, little endian, so the dtype it is stored in does not matter."""
    digest = hashlib.sha256(struct.pack("<QQQ", *lora_a.shape, lora_b.shape[0]))
    for factor in (lora_a, lora_b, scaling):
        digest.update(np.ascontiguousarray(widen(factor), "<f4").data)
    return digest.digest()


class MergeResidual:
    """What :func:`merge_exact_` returns and :func:`unmerge_exact_` takes. Immutable.

    Attributes:
        shape, dtype: of the weight.
        digest: of the adapter that is merged.
        body: uint8 tensor; its layout is not part of the API.
    """

    __slots__ = ("body", "digest", "dtype", "shape")
    body: torch.Tensor
    digest: bytes
    dtype: torch.dtype
    shape: tuple[int, int]

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, digest: bytes, body: torch.Tensor) -> None:
        for name, value in (("shape", tuple(shape)), ("dtype", dtype), ("digest", digest), ("body", body)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name, value):
        raise AttributeError(f"MergeResidual: {name} can not be assigned to")

    def __reduce__(self):
        return type(self), (self.shape, self.dtype, self.digest, self.body)

    def __repr__(self):
        size = f"{self.nbytes} bytes, {self.bits_per_weight:.3f} bits a weight"
        return f"MergeResidual({tuple(self.shape)}, {self.dtype}, {size})"

    @property
    def nbytes(self) -> int:
        """Size of everything that :meth:`to_tensors` gives."""
        return _HEADER.size + self.body.numel()

    @property
    def bits_per_weight(self) -> float:
        """Size beside the weight's: 16 would be that of a copy in bfloat16."""
        return 8 * self.nbytes / max(1, self.shape[0] * self.shape[1])

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """``{"header", "body"}``: uint8 tensors, for safetensors or any other container."""
        code = _DTYPES.index(self.dtype)
        packed = _HEADER.pack(_MAGIC, VERSION, code, ARITHMETIC, *self.shape, self.body.numel(), self.digest)
        return {"header": torch.frombuffer(bytearray(packed), dtype=torch.uint8), "body": self.body}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "MergeResidual":
        """The residual of what :meth:`to_tensors` gave.

        Raises:
            ValueError: tensors that are missing, cut short, or of another format version.
        """
        for name in ("header", "body"):
            value = tensors.get(name)
            if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
                raise ValueError(f"residual: expected a 1-D uint8 tensor '{name}', got {_described(value)}")
        packed, body = tensors["header"].cpu().numpy().tobytes(), tensors["body"].contiguous()
        if len(packed) != _HEADER.size or packed[:4] != _MAGIC:
            raise ValueError(f"residual: expected a header of {_HEADER.size} bytes that starts with {_MAGIC!r}")
        _, version, code, arithmetic, rows, cols, size, digest = _HEADER.unpack(packed)
        if version != VERSION or arithmetic != ARITHMETIC:
            raise ValueError(
                f"residual: expected format {VERSION}, arithmetic {ARITHMETIC}, got {version} and {arithmetic}; "
                "it was made by another version of lora_kernels"
            )
        if code >= len(_DTYPES):
            raise ValueError(f"residual: expected a dtype code below {len(_DTYPES)}, got {code}")
        if size != body.numel():
            raise ValueError(f"residual: expected a body of {size} bytes (its header says), got {body.numel()}")
        return cls((rows, cols), _DTYPES[code], digest, body)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file."""
        from safetensors.torch import save_file

        save_file({name: value.cpu() for name, value in self.to_tensors().items()}, os.fspath(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MergeResidual":
        """Reads what :meth:`save` wrote. ValueError for any other file."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(os.fspath(path))
        except SafetensorError as error:
            raise ValueError(f"residual: {path} is not a safetensors file: {error}") from error
        return cls.from_tensors(tensors)


def _described(value):
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
