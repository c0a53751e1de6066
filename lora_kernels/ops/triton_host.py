"""What every Triton launcher needs on the host: interpreter or GPU, precision, alignment, cases for the static gate.

Importing this imports Triton; ``triton_backend.py`` does that only when a Triton kernel is asked for.
"""

import dataclasses
import functools

import torch
import triton

# Under TRITON_INTERPRET=1 kernels run in Triton's interpreter, on CPU tensors: for tests. Fixed at their definition.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def upcast(*tensors):
    """The UPCAST switch of the kernels: the interpreter can not multiply bfloat16. Off on a GPU."""
    return INTERPRETED and any(tensor is not None and tensor.dtype == torch.bfloat16 for tensor in tensors)


def precision(*tensors):
    """``input_precision`` of ``tl.dot``. Two float32 operands are never cut to tf32; where a half and a float32
    operand meet in float32, three tf32 products keep all bits that count."""
    dtypes = {tensor.dtype for tensor in tensors}
    return "ieee" if dtypes == {torch.float32} else "tf32x3" if torch.float32 in dtypes else "tf32"


@functools.cache
def _capability(index):
    return torch.cuda.get_device_capability(index)


def capability(tensor):
    """(major, minor) of the tensor's GPU; (0, 0) in the interpreter."""
    return (0, 0) if INTERPRETED else _capability(tensor.device.index)


@functools.cache
def _num_sms(index):
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_sms(tensor):
    """Multiprocessors of the tensor's GPU; 4 in the interpreter, so that persistent kernels loop there too."""
    return 4 if INTERPRETED else _num_sms(tensor.device.index)


def has_pdl(tensor):
    """Whether the GPU links two launches (programmatic dependent launch)."""
    return capability(tensor) >= (9, 0)


def tma_ready(*tensors):
    """Whether TMA descriptors can address these 2-D tensors: unit column stride, rows and base on 16 bytes, some
    elements."""
    return all(
        tensor.stride(-1) == 1
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
        and tensor.numel() > 0
        for tensor in tensors
    )


@dataclasses.dataclass(frozen=True)
class StaticCase:
    """One production configuration of a kernel, compiled ahead of time by ``lora_kernels.testing.static_gate``.

    Attributes:
        name: unique, ``"linear.one_pass bf16 r16 128x256"``.
        kernel: the ``triton.jit`` function.
        types: types of the arguments that are no constexpr, in the order of the kernel: ``"*bf16"``, ``"i32"``,
            ``"i64"``, ``"fp32"``, ``"tensordesc<bf16[128, 64]>"``; one text, separated by ``"; "``.
        constants: the constexpr arguments by name; an argument that is None or 1 belongs here too.
        unaligned: names of pointers and integers that are not known to be multiples of 16.
        num_warps, num_stages, pdl: launch options.
        mma: what the matrix products must become: ``"wgmma"`` (sm_80 mma.sync, sm_90 wgmma, sm_100 tcgen05),
            ``"mma"`` (mma.sync suffices everywhere) or ``"none"``.
        archs: compute capabilities to compile for.
    """

    name: str
    kernel: object
    types: str
    constants: dict
    unaligned: tuple = ()
    num_warps: int = 4
    num_stages: int = 3
    pdl: bool = False
    mma: str = "mma"
    archs: tuple = (80, 90, 100)
