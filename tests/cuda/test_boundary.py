"""The CUDA ops at torch's boundary, their kernels on the host: schemas keep their word, and the public ops' shapes and
dtypes (what ``torch.compile`` sees) are those that the kernels give."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lora_kernels.ops import cuda_backend, plan_batch
from lora_kernels.ops import library as ops
from lora_kernels.testing import make_linear, make_multi

NAMES = cuda_backend.names()
pytestmark = pytest.mark.usefixtures("library")


def _samples():
    case, multi = make_linear(6, 24, 16, 4, torch.bfloat16), make_multi(6, 24, 16, 4, 3, torch.bfloat16)
    plan = plan_batch(multi.token_slots, multi.slot_ranks, num_slots=3)
    rows = (plan.slot_ranks, plan.row_order, plan.segment_starts)
    x, weight, _, a, b, s = case.args()
    y, h = torch.randn(6, 16).bfloat16(), torch.randn(6, 4)
    nothing, banks = torch.empty(0), (multi.a_bank, multi.b_bank, multi.slot_scalings)
    merged = weight.clone()
    body, _ = ops.cuda_op("merge_exact_")(merged, a, b, s)
    return {
        "lora_linear": (*case.args(), None, False),
        "lora_linear_out": (y.clone(), *case.args(), None, False),
        "lora_linear_train": (*case.args(), 0.0, None, None, False),
        "lora_add_": (y.clone(), x, a, b, s, False),
        "lora_linear_backward": (
            *(y, x, weight, a, b, s, h, nothing.byte(), 0.0, None),
            *(True, True, True, False),
        ),
        "multi_lora_linear": (multi.x, multi.weight, multi.bias, *banks, *rows, None, False),
        "lora_shrink": (multi.x, multi.a_bank, *rows, False),
        "lora_expand_": (y.clone(), h, multi.b_bank, multi.slot_scalings, *rows, None, False),
        "merge_": (weight.clone(), a, b, s, -1.0),
        "merge_list_": ([weight.clone(), weight.clone()], [a, a], [b, b], [s, s], 1.0),
        "merge_is_finite": (weight, a, b, s, 1.0),
        "switch_": (weight.clone(), a, b, s, a, b, s),
        "merge_exact_": (weight.clone(), a, b, s),
        "unmerge_exact_": (merged.clone(), a, b, s, body),
        "switch_exact_": (merged.clone(), a, b, s, a, b, s, body),
    }


def _kernels():
    names = [name for name in ops.SCHEMAS if torch._C._dispatch_has_kernel_for_dispatch_key(_full(name), "CPU")]
    return set(names)


def _full(name):
    return f"{ops.CUDA_NAMESPACE}::{name}"


def test_every_kernel_is_sampled():
    assert set(_samples()) == _kernels()


@pytest.mark.parametrize("name", NAMES)
def test_schema(name):
    args = _samples()[name]
    assert cuda_backend.refusal(name, args) is None
    torch.library.opcheck(ops.cuda_op(name), args, test_utils="test_schema")


@pytest.mark.parametrize("name", NAMES)
def test_the_fake_gives_what_the_kernel_gives(name):
    args = _samples()[name]
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        to_fake = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
        fake = ops.op(name)(*([to_fake(t) for t in a] if isinstance(a, list) else to_fake(a) for a in args))
    real = ops.cuda_op(name)(*args)
    for expected, got in zip(*(r if isinstance(r, (tuple, list)) else (r,) for r in (fake, real)), strict=True):
        if expected is None:
            assert got is None
            continue
        assert expected.dtype == got.dtype
        assert expected.dim() == got.dim()
        if "exact" not in name:
            assert expected.shape == got.shape


def test_limits_name_ops_that_have_kernels():
    assert set(NAMES) == _kernels()
    assert set(cuda_backend.REFUSED) <= _kernels()
