"""Runs the emulated CUDA ops on tensors beside which no memory may be touched: one that is ends this process.

Every tensor ends at a page without access, or begins after one. Started by ``test_guard.py``.
"""

import ctypes
import mmap
import sys

import emulated
import torch

from lora_kernels.ops import library as ops
from lora_kernels.ops import plan_batch
from lora_kernels.testing import make_linear, make_multi

PAGE = mmap.PAGESIZE
_kept = []


def guarded(tensor, at_end):
    """A copy of the tensor's elements, in its order, between two pages without access."""
    size = tensor.numel() * tensor.element_size()
    room = -(-max(size, 1) // PAGE) * PAGE
    area = mmap.mmap(-1, room + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    _kept.append(area)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (start, start + PAGE + room):
        assert protect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
    offset = PAGE + (room - size if at_end else 0)
    copy = torch.frombuffer(area, dtype=tensor.dtype, count=max(tensor.numel(), 1), offset=offset)
    return copy[: tensor.numel()].view(tensor.shape).copy_(tensor)


def run(shape, dtype, at_end):
    near = lambda *tensors: [guarded(t.contiguous(), at_end) for t in tensors]  # noqa: E731
    case = make_linear(*shape, dtype)
    x, weight, bias, a, b, s = near(*case.args())
    if dtype != torch.float32:
        ops.cuda_op("lora_linear")(x, weight, bias, a, b, s, None, False)
        (y,) = near(torch.zeros(shape[0], shape[2], dtype=dtype))
        ops.cuda_op("lora_linear_out")(y, x, weight, bias, a, b, s, None, False)
        ops.cuda_op("lora_add_")(y, x, a, b, s, False)
        nothing = torch.empty(0)
        rest = (nothing, nothing.byte(), 0.0, None, True, False, False, False)
        ops.cuda_op("lora_linear_backward")(y, x, weight, a, b, s, *rest)
        multi = make_multi(*shape, 3, dtype)
        plan = plan_batch(multi.token_slots, multi.slot_ranks, num_slots=3)
        rows = near(plan.slot_ranks, plan.row_order, plan.segment_starts)
        banks = near(multi.a_bank, multi.b_bank, multi.slot_scalings)
        ops.cuda_op("multi_lora_linear")(x, weight, bias, *banks, *rows, None, False)
        h = ops.cuda_op("lora_shrink")(x, banks[0], *rows, False)
        ops.cuda_op("lora_expand_")(y, *near(h), *banks[1:], *rows, None, False)
    ops.cuda_op("merge_")(weight, a, b, s, 1.0)
    ops.cuda_op("merge_list_")([weight, *near(weight)], [a, a], [b, b], [s, s], 1.0)
    ops.cuda_op("switch_")(weight, a, b, s, a, b, s)
    ops.cuda_op("merge_is_finite")(weight, a, b, s, 1.0)
    body, status = ops.cuda_op("merge_exact_")(weight, a, b, s)
    assert status.tolist() == [0, -1]
    assert ops.cuda_op("unmerge_exact_")(weight, a, b, s, *near(body)).tolist() == [0, -1]


if __name__ == "__main__":
    emulated.load()
    if "probe" in sys.argv:
        weight = guarded(torch.zeros(3, 5), True)
        ctypes.memmove(weight.data_ptr() + 60, b"x", 1)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((1, 1, 1, 1), (5, 17, 9, 3), (21, 64, 72, 16), (9, 2100, 33, 5)):
            for at_end in (False, True):
                run(shape, dtype, at_end)
                _kept.clear()
    print("touched nothing else")
