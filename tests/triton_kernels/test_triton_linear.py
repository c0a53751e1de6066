"""``lora_linear`` and ``lora_add_`` on Triton against float64: every path, odd shapes, strides, slices, isolation."""

import dataclasses

import numpy as np
import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops.linear import config
from lora_kernels.testing import DTYPES, assert_within_budget, eager_lora_linear, exact_lora_linear, make_linear

triton_linear = pytest.importorskip("lora_kernels.ops.linear.triton")

# M, K, N, R: tails in every dimension, primes, more tiles than programs.
SHAPES = ((1, 64, 48, 1), (5, 131, 67, 5), (16, 33, 32, 16), (37, 96, 70, 16), (37, 131, 67, 24), (70, 128, 96, 64))
PATHS = {
    "decode": config.Config("decode", 64, 32, 32, 4, 1),
    "decode, split K": config.Config("decode", 64, 32, 32, 4, 1, split_k=3),
    "one_pass": config.Config("one_pass", 16, 32, 32, 4, 1, group_m=2),
    "two_pass": config.Config("two_pass", 32, 16, 32, 4, 1, group_m=2),
    "two_pass, tma": config.Config("two_pass", 32, 32, 32, 4, 1, tma=True),
    "vendor": config.VENDOR,
}


def _run(tiles, x, weight, bias, lora_a, lora_b, scaling, out_splits=None):
    y = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype, device=x.device)
    triton_linear.run(y, x, weight, bias, lora_a, lora_b, scaling, out_splits, tiles)
    return y


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_within_budget(shape, dtypes, device):
    for base in (True, False):  # a big base would hide a wrong update
        case = make_linear(*shape, *DTYPES[dtypes], base=base, device=device)
        ours = lk.ops.lora_linear(*case.args())
        assert_within_budget(ours, eager_lora_linear(*case.args()), exact_lora_linear(*case.args()), f"base={base}")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(37, 96, 70, 16), (37, 131, 67, 24)], ids=str)
def test_every_path_within_budget(path, shape, device):
    if PATHS[path].tma:
        shape = (37, 136, 72, 24)
    for base in (True, False):
        case = make_linear(*shape, torch.float16, base=base, device=device)
        ours = _run(PATHS[path], *case.args())
        assert_within_budget(ours, eager_lora_linear(*case.args()), exact_lora_linear(*case.args()), path)


@pytest.mark.parametrize("path", PATHS)
def test_slices(path, device):
    """Slices of uneven width, one of them empty; no tile mixes two."""
    splits = [40, 0, 17, 7]
    case = make_linear(19, 64, 64, 6, torch.float16, slices=4, device=device)
    ours = _run(PATHS[path], *case.args(), out_splits=splits)
    eager, exact = (f(*case.args(), out_splits=splits) for f in (eager_lora_linear, exact_lora_linear))
    assert_within_budget(ours, eager, exact, path)


@pytest.mark.parametrize("rank", [3, 80, 130, 512])
def test_ranks(rank, device):
    case = make_linear(20, 40, 24, rank, torch.float16, base=False, device=device)
    for tokens in (20, 3):
        case.x = case.x[:tokens]
        ours = lk.ops.lora_linear(*case.args())
        assert_within_budget(ours, eager_lora_linear(*case.args()), exact_lora_linear(*case.args()), f"rank {rank}")


@pytest.mark.parametrize("tokens", [3, 20])
def test_strides(tokens, device):
    """Columns of a wider x, a weight and adapters stored by columns, an output that is a column slice."""
    case = make_linear(tokens, 48, 40, 8, torch.float16, device=device)
    expected = lk.ops.lora_linear(*case.args())
    wide = torch.full((tokens, 2 * 48 + 1), torch.nan, dtype=torch.float16, device=device)
    wide[:, 1::2] = case.x
    moved = dataclasses.replace(
        case,
        x=wide[:, 1::2],
        weight=case.weight.t().contiguous().t(),
        lora_a=case.lora_a.t().contiguous().t(),
        lora_b=case.lora_b.t().contiguous().t(),
        bias=torch.stack([case.bias, case.bias], 1)[:, 0],
    )
    out = torch.full((tokens, 3 * 40), 7.0, dtype=torch.float16, device=device)
    lk.ops.lora_linear(*moved.args(), out=out[:, 40:80])
    torch.testing.assert_close(out[:, 40:80], expected)
    assert (out[:, :40] == 7).all()
    assert (out[:, 80:] == 7).all()


@pytest.mark.parametrize(("tokens", "features", "outputs"), [(0, 32, 16), (3, 0, 16), (3, 32, 0), (20, 0, 16)])
def test_empty(tokens, features, outputs, device):
    case = make_linear(tokens, features, outputs, 4, device=device)
    y = lk.ops.lora_linear(*case.args())
    assert y.shape == (tokens, outputs)
    if features == 0:
        torch.testing.assert_close(y, case.bias.expand_as(y))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("y_dtype", ["same", "f32"])
def test_add(dtypes, y_dtype, device):
    dtype, adapter_dtype = DTYPES[dtypes]
    for shape in ((1, 64, 48, 4), (37, 131, 67, 24)):
        case = make_linear(*shape, dtype, adapter_dtype, device=device)
        y = torch.nn.functional.linear(case.x, case.weight).to(torch.float32 if y_dtype == "f32" else dtype)
        update = (case.x, torch.zeros_like(case.weight), None, case.lora_a, case.lora_b, case.scaling)
        exact = y.double() + exact_lora_linear(*update)
        eager = y + eager_lora_linear(*update)
        ours = lk.ops.lora_add_(y.clone(), case.x, case.lora_a, case.lora_b, case.scaling)
        assert_within_budget(ours, eager, exact)


@pytest.mark.parametrize("rank", [16, 24])
def test_batch_invariant_rows_have_the_same_bits_in_any_batch(rank, device):
    case = make_linear(35, 96, 48, rank, torch.float16, device=device)
    with lk.use_backend("triton", batch_invariant=True):
        whole = lk.ops.lora_linear(*case.args())
        added = lk.ops.lora_add_(torch.zeros_like(whole), case.x, case.lora_a, case.lora_b, case.scaling)
        for rows in (slice(0, 1), slice(7, 9), slice(20, 35)):
            part = dataclasses.replace(case, x=case.x[rows])
            assert torch.equal(lk.ops.lora_linear(*part.args()), whole[rows])
            alone = lk.ops.lora_add_(torch.zeros_like(whole[rows]), part.x, case.lora_a, case.lora_b, case.scaling)
            assert torch.equal(alone, added[rows])


def test_an_infinite_row_reaches_no_other(device):
    case = make_linear(20, 64, 48, 8, torch.float16, device=device)
    expected = lk.ops.lora_linear(*case.args())
    case.x[4] = torch.inf
    ours = lk.ops.lora_linear(*case.args())
    others = torch.arange(20) != 4
    assert torch.equal(ours[others], expected[others])


@pytest.mark.parametrize("path", ["decode", "one_pass", "two_pass"])
def test_offsets_beyond_two_to_the_31(path, device):
    """Rows of x and y that lie 2³¹ elements apart. On a CPU only the pages that are touched take memory."""
    if device != "cpu":
        pytest.skip("tests/gpu has this at full size")
    apart = 2**31
    case = make_linear(2, 32, 24, 4, torch.float16)
    far_x, far_y = (torch.from_numpy(np.empty(apart + 32, np.float16)) for _ in range(2))
    x, y = far_x.as_strided((2, 32), (apart, 1)), far_y.as_strided((2, 24), (apart, 1))
    x.copy_(case.x)
    triton_linear.run(y, x, *case.args()[1:], None, PATHS[path])
    assert torch.equal(y, _run(PATHS[path], *case.args()))


def test_choice_is_pure_and_reaches_every_path():
    sizes = [(m, 4096, 4096, r, b) for m in (1, 64, 65, 512, 513, 8192) for r in (1, 16, 64, 512) for b in (2, 4)]
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        chosen = [config.choose(*size, capability) for size in sizes]
        assert chosen == [config.choose(*size, capability) for size in sizes]
        assert {tiles.path for tiles in chosen} == {"decode", "one_pass", "two_pass"}
        for (_, _, _, rank, _), tiles in zip(sizes, chosen, strict=True):
            assert tiles.path == "two_pass" or rank <= 64
        invariant = {config.choose(m, 64, 64, 8, 2, capability, batch_invariant=True) for m in (1, 63, 64, 4000)}
        assert len(invariant) == 1
