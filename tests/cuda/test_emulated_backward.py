"""The gradients of an adapter, their kernels' source run on the host: error budget, parts of a sum, strides, bits."""

from ctypes import c_int64

import pytest
import torch
from emulated_cases import cuda

from lora_kernels.ops import cuda_backend
from lora_kernels.testing import assert_within_budget, make_linear

pytestmark = pytest.mark.usefixtures("library")
F16, BF16 = torch.float16, torch.bfloat16
# M, K, N, R: one row; odd sizes; 16 rows of a gradient and 64 at a time, full and not; a sum in several parts.
SHAPES = [(1, 1, 1, 1), (33, 70, 50, 5), (70, 64, 130, 16), (40, 72, 33, 100), (1100, 70, 24, 8), (1031, 40, 64, 33)]
NO_MASK = torch.empty(0, dtype=torch.uint8)


def _case(shape, dtype):
    case = make_linear(*shape, dtype)
    dy = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    _, h, mask = cuda("lora_linear_train", *case.args(), 0.0, None, None, False)
    assert mask.numel() == 0
    return case, dy, h


def _backward(case, dy, h, *needs):
    adapter = (case.lora_a, case.lora_b, case.scaling)
    return cuda("lora_linear_backward", dy, case.x, case.weight, *adapter, h, NO_MASK, 0.0, None, *needs, False)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, dtype):
    case, dy, h = _case(shape, dtype)
    assert_within_budget(h, (case.x @ case.lora_a.t()).float(), case.x.double() @ case.lora_a.double().t())
    dx, da, db = _backward(case, dy, h, True, True, True)
    in_dtype = (dy, case.x, case.lora_a, case.lora_b, case.scaling.to(dtype))
    (eager_a, eager_b), (exact_a, exact_b) = (
        (((dy @ b) * s).t() @ x, dy.t() @ ((x @ a.t()) * s))
        for dy, x, a, b, s in (in_dtype, [t.double() for t in (*in_dtype[:4], case.scaling)])
    )
    assert_within_budget(da, eager_a, exact_a, f"lora_a {shape}")
    assert_within_budget(db, eager_b, exact_b, f"lora_b {shape}")
    alone = [
        _backward(case, dy, h, *needs) for needs in ((True, False, False), (False, True, False), (False, False, True))
    ]
    assert all(torch.equal(found[i], whole) for i, (found, whole) in enumerate(zip(alone, (dx, da, db), strict=True)))
    assert [t.numel() for t in alone[0][1:]] == [0, 0]


def test_the_forward_pass_is_that_without_gradients():
    case = make_linear(70, 1100, 50, 20, BF16)
    trained, *_ = cuda("lora_linear_train", *case.args(), 0.0, None, None, True)
    assert torch.equal(trained, cuda("lora_linear", *case.args(), None, True))


def test_any_order_of_threads_and_blocks_gives_the_same_bits(set_order):
    case, dy, h = _case((1100, 40, 72, 20), BF16)
    found = []
    for seed, early in ((0, True), (0, False), (3, True), (9, False)):
        set_order(seed, early)
        found.append(_backward(case, dy, h, False, True, True))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_strides():
    case, dy, h = _case((40, 48, 40, 8), BF16)
    expected = _backward(case, dy, h, True, True, True)
    apart = lambda t: t.t().contiguous().t()  # noqa: E731
    case.x, case.lora_a, case.lora_b = apart(case.x), apart(case.lora_a), apart(case.lora_b)
    found = _backward(case, apart(dy), h, True, True, True)
    assert all(map(torch.equal, found, expected))
    same = _backward(case, dy[:1].expand(40, -1), h, False, True, True)
    whole = _backward(case, dy[:1].expand(40, -1).contiguous(), h, False, True, True)
    assert all(map(torch.equal, same, whole))


def test_no_rows_give_gradients_of_zero():
    case, dy, h = _case((40, 48, 24, 8), F16)
    case.x = case.x[:0]
    dx, da, db = _backward(case, dy[:0], h[:0], True, True, True)
    assert dx.shape == (0, 48)
    assert not da.any()
    assert not db.any()


def test_dropout_is_refused_by_name():
    case, dy, h = _case((4, 24, 16, 4), BF16)
    train = (*case.args(), 0.5, torch.tensor(7), None, False)
    back = (dy, case.x, case.weight, case.lora_a, case.lora_b, case.scaling, h, torch.ones(4, 3).byte(), 0.5, None)
    for name, args in (("lora_linear_train", train), ("lora_linear_backward", (*back, True, True, True, False))):
        assert "dropout" in cuda_backend.refusal(name, args)
        with pytest.raises(RuntimeError, match="dropout"):
            cuda(name, *args)


def test_sums_are_cut_until_they_fill_the_gpu(library):
    parts = lambda *sizes: library.lk_gradient_parts(*map(c_int64, sizes), 132)  # noqa: E731
    assert parts(8192, 16, 4096) == 8  # 64 tiles
    assert parts(8192, 16, 14336) == 2
    assert parts(300, 16, 4096) == parts(0, 16, 4096) == 1  # no less than 256 rows a part
    assert parts(65536, 16, 64) == 16
