"""What every Triton launcher needs on the host: interpreter or GPU, precision, alignment, cases for the static gate.

Importing this imports Triton; ``triton_backend.py`` does that only when a Triton kernel is asked for.
"""

import contextlib
import dataclasses
import functools

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

# Under TRITON_INTERPRET=1 kernels run in Triton's interpreter, on CPU tensors: for tests. Fixed at their definition.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def upcast(*tensors):
    """The UPCAST switch of the kernels: the interpreter can not multiply bfloat16. Off on a GPU."""
    return INTERPRETED and any(tensor is not None and tensor.dtype == torch.bfloat16 for tensor in tensors)


def precision(*tensors):
    """``input_precision`` of ``tl.dot``. Two float32 operands are never cut to tf32. Where a half and a float32 operand
    meet in float32, tf32 keeps 10 bits: more than bfloat16's 7; for float16's 10 it takes three products."""
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes == {torch.float32}:
        return "ieee"
    return "tf32x3" if dtypes == {torch.float32, torch.float16} else "tf32"


def full_precision(*tensors):
    """As :func:`precision`, where the result is kept in float32: gradients of float32 adapters lose no bits."""
    return (
        "tf32x3"
        if precision(*tensors) == "tf32" and torch.float32 in {t.dtype for t in tensors}
        else precision(*tensors)
    )


@functools.cache
def _properties(index):
    properties = torch.cuda.get_device_properties(index)
    return properties.name, (properties.major, properties.minor), properties.multi_processor_count


# (name, capability, multiprocessors) that ``pretend`` sets: the static gate launches without a GPU.
_pretended = ("interpreter", (0, 0), 4) if INTERPRETED else None


def _gpu(tensor):
    return _pretended or _properties(tensor.device.index)


def gpu_name(tensor):
    """Name of the tensor's GPU."""
    return _gpu(tensor)[0]


def capability(tensor):
    """(major, minor) of the tensor's GPU; (0, 0) in the interpreter."""
    return _gpu(tensor)[1]


def num_sms(tensor):
    """Multiprocessors of the tensor's GPU; 4 in the interpreter, so that persistent kernels loop there too."""
    return _gpu(tensor)[2]


@contextlib.contextmanager
def pretend(capability, num_sms=132):
    """In the block every tensor counts as being on such a GPU."""
    global _pretended
    before, _pretended = _pretended, ("pretended", capability, num_sms)
    try:
        yield
    finally:
        _pretended = before


def has_pdl(tensor):
    """Whether the GPU links two launches (programmatic dependent launch)."""
    return capability(tensor) >= (9, 0)


def tma_ready(*tensors):
    """Whether TMA descriptors can address these 2-D tensors: unit column stride, rows that do not overlap, rows and
    base on 16 bytes, some elements."""
    return all(
        tensor.stride(-1) == 1
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
        and tensor.numel() > 0
        for tensor in tensors
    )


# Tensors of a group that a kernel takes descriptors of.
MOST_DESCRIPTORS = 4


def descriptors(tensors, block):
    """A TMA descriptor a tensor, then None up to :data:`MOST_DESCRIPTORS`: arguments of their own, as Triton's launcher
    unpacks none inside a tuple. All None without tensors."""
    found = [TensorDescriptor.from_tensor(tensor, block) for tensor in tensors]
    return *found, *[None] * (MOST_DESCRIPTORS - len(found))


def aligned(tensor):
    """Whether the matrix is read 16 bytes at a time, along rows or along columns: Triton asks no more of a stride than
    whether it is a multiple of 16 elements."""
    steps = sorted(tensor.stride())
    return steps[0] <= 1 and steps[1] % 16 == 0 and tensor.data_ptr() % 16 == 0


def packed(tensor):
    """The tensor, or a copy, contiguous and on 16 bytes: one of several that a kernel picks from (``one_of``)."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def strides(tensor):
    """The strides of a tensor that may be None, of one dimension then."""
    return (0,) if tensor is None else tensor.stride()


def tiles_n(weight, out_splits, block_n):
    """Tiles of columns of y: none holds columns of two slices."""
    return sum(-(-width // block_n) for width in out_splits or (weight.shape[0],))


@dataclasses.dataclass(frozen=True)
class StaticCase:
    """A call whose kernels ``lora_kernels.testing.static_gate`` compiles ahead of time, just as the launcher asks.

    Attributes:
        name: unique, ``"lora_linear bf16 M8192 r16"``.
        call: function of no argument that runs a launcher on tensors of the device ``"meta"``, of production sizes.
        mma: what the matrix products of a kernel must become, by the kernel's name: ``"wide"`` (mma.sync on sm_80,
            wgmma on sm_90, tcgen05 on sm_100), ``"mma"`` (any of these; the default) or ``"none"``.
        archs: compute capabilities, as 10 · major + minor.
    """

    name: str
    call: object
    mma: dict = dataclasses.field(default_factory=dict)
    archs: tuple = (80, 90, 100)
