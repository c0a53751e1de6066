"""``row_norm`` and ``lora_embedding`` on Triton against float64: shapes, strides, padding, ids out of range."""

import pytest
import torch

from lora_kernels.ops import lora_embedding
from lora_kernels.ops.dora.api import row_norm
from lora_kernels.testing import (
    DTYPES,
    assert_within_budget,
    eager_lora_embedding,
    embedding_results,
    make_embedding,
    make_linear,
)

pytest.importorskip("lora_kernels.ops.embedding.triton")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 70, 5), (40, 33, 40)], ids=str)
def test_row_norm(shape, dtypes, device):
    columns, rows, rank = shape
    case = make_linear(1, columns, rows, rank, *DTYPES[dtypes], device=device)
    exact = (case.weight.double() + case.scaling * (case.lora_b.double() @ case.lora_a.double())).norm(dim=1)
    for weight in (case.weight, case.weight.t().contiguous().t(), case.weight.repeat_interleave(2, 1)[:, ::2]):
        ours = row_norm(weight, case.lora_a, case.lora_b, case.scaling)
        assert bool(((ours - exact).abs() <= 8 * torch.finfo(torch.float32).eps * exact).all())


def test_row_norm_of_rows_that_the_update_cancels_and_of_none(device):
    torch.manual_seed(0)
    a, b = torch.randn(4, 50, device=device), torch.randn(30, 4, device=device)
    weight = -(b @ a)
    weight[::2] += 1e-4
    exact = (weight.double() + b.double() @ a.double()).norm(dim=1)
    absolute = 8 * torch.finfo(torch.float32).eps * weight.norm(dim=1)
    assert bool(((row_norm(weight, a, b, 1.0) - exact).abs() <= absolute).all())
    assert row_norm(weight[:0], a, b[:0], 1.0).shape == (0,)
    b[3] = torch.inf
    assert row_norm(weight, a, b, 1.0).isfinite().sum() == 29


def test_row_norm_refuses_other_dtypes(device):
    case = make_linear(1, 8, 8, 2, device=device)
    with pytest.raises(RuntimeError, match=r"row_norm: backend 'triton' has no kernel for float64; the reference has"):
        row_norm(case.weight.double(), case.lora_a, case.lora_b, 1.0)
    with pytest.raises(RuntimeError, match=r"row_norm: .*lora_a is torch.float64; the kernel takes float32"):
        row_norm(case.weight, case.lora_a.double(), case.lora_b, 1.0)


def test_ids_that_are_apart(device):
    """The last token of each sequence, as a model that generates asks for it."""
    case = make_embedding(20, 50, 24, 4, device=device)
    ids, rest = case.ids.view(4, 5)[:, -1:], case.args()[1:]
    assert torch.equal(lora_embedding(ids, *rest), lora_embedding(ids.clone(), *rest))
    leaves = [case.lora_a.requires_grad_(), case.lora_b.requires_grad_()]
    found = [torch.autograd.grad(lora_embedding(each, *rest).sum(), leaves) for each in (ids, ids.clone())]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_embedding_and_its_gradients(dtypes, device):
    for shape, padding_idx in (((1, 3, 5, 1), None), ((40, 11, 37, 5), 3), ((18, 90, 48, 20), None)):
        case = make_embedding(*shape, *DTYPES[dtypes], base=padding_idx is None, device=device)
        found = embedding_results(lora_embedding, case, padding_idx=padding_idx)
        expected = [
            embedding_results(eager_lora_embedding, case, dtype, padding_idx) for dtype in (None, torch.float64)
        ]
        for index, (ours, theirs, exact) in enumerate(zip(found, *expected, strict=True)):
            assert_within_budget(ours, theirs, exact, f"{shape}, result {index}")
        assert all(map(torch.equal, embedding_results(lora_embedding, case, padding_idx=padding_idx), found))


def test_an_id_out_of_range_gives_nan_and_reads_nothing(device):
    case = make_embedding(5, 9, 8, 2, device=device)
    case.ids[1], case.ids[3] = 9, -1
    y = lora_embedding(*case.args())
    assert y.isnan().all(1).tolist() == [False, True, False, True, False]
    assert lora_embedding(case.ids[:0], *case.args()[1:]).shape == (0, 8)
