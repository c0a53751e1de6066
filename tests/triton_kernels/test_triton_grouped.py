"""Projections that share their input on Triton, forward and backward: against float64 and to the bit."""

import itertools

import pytest
import torch

import lora_kernels as lk
from lora_kernels.check import CHECKS
from lora_kernels.ops import grouped_lora_linear
from lora_kernels.ops.linear import config
from lora_kernels.testing import DTYPES, assert_within_budget, eager_lora_linear, exact_lora_linear, make_grouped

triton_grouped = pytest.importorskip("lora_kernels.ops.grouped.triton")


@pytest.fixture(autouse=True)
def _two_passes_for_few_rows(monkeypatch):
    monkeypatch.setattr(triton_grouped.config, "FEW_ROWS", 4)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_results_and_gradients_are_within_budget(dtypes, device):
    for shape in ((1, 64, 48, 8), (37, 67, 43, 5)):
        for index, (ours, eager, exact) in enumerate(CHECKS["grouped_lora_linear"](shape, *DTYPES[dtypes], device)):
            assert_within_budget(ours, eager, exact, f"{shape}, result {index}")


TILES = {
    "apart": triton_grouped.config.APART,
    "two_pass": config.Config("two_pass", 32, 32, 32, 4, 1, group_m=2),
    "two_pass, tma": config.Config("two_pass", 32, 32, 32, 4, 1, tma=True, group_m=2),
}


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("path", TILES)
def test_inference_of_three_projections_of_different_ranks(tokens, path, device, monkeypatch):
    """Ranks of several blocks, an odd width."""
    monkeypatch.setattr(triton_grouped.config, "choose", lambda *args, **rules: TILES[path])
    case = make_grouped(tokens, 64, (48, 7, 33), (20, 70, 1), torch.float16, device=device)
    with torch.no_grad():
        y = grouped_lora_linear(*case.args())
    for i, ours in enumerate(y):
        one = (case.x, *(group[i] for group in case.groups()[1:]), case.scalings[i])
        assert_within_budget(ours, eager_lora_linear(*one), exact_lora_linear(*one), f"projection {i}")
    with torch.no_grad():
        assert all(map(torch.equal, grouped_lora_linear(*case.args()), y))


def test_a_first_adapter_of_rank_one_that_is_a_view(device):
    """Its row stride means nothing, and is none of the others'."""
    case = make_grouped(40, 64, (16, 24), (1, 3), device=device)
    expected = grouped_lora_linear(*case.args())
    case.lora_a[0] = torch.nn.functional.pad(case.lora_a[0], (0, 64))[:, :64]
    assert case.lora_a[0].is_contiguous()
    assert all(map(torch.equal, grouped_lora_linear(*case.args()), expected))


def test_factors_of_a_flat_buffer_come_to_the_kernel_on_16_bytes(device, monkeypatch):
    """The kernel reads 16 bytes at a time of one of several tensors: Triton does not see where each begins."""
    case = make_grouped(40, 64, (16, 24), (4, 4), torch.float16, device=device)
    expected, shrink, begin = grouped_lora_linear(*case.args()), triton_grouped.linear.shrink, []
    flat = torch.cat([torch.zeros(1, dtype=torch.float16, device=device), *(a.flatten() for a in case.lora_a)])
    case.lora_a = [flat[1 + 256 * i :][:256].view(4, 64) for i in range(2)]

    def noted(x, lora_a, *args, **options):
        begin.extend(a.data_ptr() % 16 for a in lora_a)
        return shrink(x, lora_a, *args, **options)

    monkeypatch.setattr(triton_grouped.linear, "shrink", noted)
    assert all(map(torch.equal, grouped_lora_linear(*case.args()), expected))
    assert begin == [0, 0]


def test_more_projections_than_a_kernel_takes_descriptors_of(device):
    widths, ranks = (16, 8, 24, 8, 40), (4, 1, 3, 2, 5)
    case = make_grouped(37, 64, widths, ranks, torch.float16, device=device)
    x, generator = case.x.requires_grad_(), torch.Generator().manual_seed(1)
    dy = [torch.randn(37, width, generator=generator).to(device, torch.float16) for width in widths]

    def results(run, cast):
        y = [run(cast(x), *map(cast, each), s) for *each, s in zip(*case.groups()[1:], case.scalings, strict=True)]
        return [*y, *torch.autograd.grad(y, x, [cast(part) for part in dy])]

    y = grouped_lora_linear(*case.args())
    ours = [*y, *torch.autograd.grad(y, x, dy)]
    eager, exact = results(eager_lora_linear, torch.clone), results(exact_lora_linear, torch.Tensor.double)
    for found, *others in zip(ours, eager, exact, strict=True):
        assert_within_budget(found, *others)


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, name, kernel, launches):
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid):
        self.launches.append(self.name)
        return self.kernel[grid]


@pytest.mark.parametrize("need_h", [False, True])
def test_all_projections_take_two_launches(need_h, device, monkeypatch):
    launches = []
    for module in (triton_grouped.linear.triton_kernels, triton_grouped.triton_kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(name, getattr(module, name), launches))
    case = make_grouped(40, 64, (48, 16, 16), (4, 12, 1), torch.float16, device=device)
    y = [torch.empty(40, width, dtype=torch.float16, device=device) for width in (48, 16, 16)]
    triton_grouped.grouped_lora_linear(*case.args(), y, need_h, False)
    assert launches == ["shrink_kernel", "grouped_kernel"]


@pytest.fixture
def one_launch_for_few_rows(monkeypatch):
    """The names of the kernels that were launched."""
    tiles, launches = config.Config("decode", 32, 16, 32, 4, 1), []
    monkeypatch.setattr(triton_grouped.config, "choose", lambda *args, **rules: tiles)
    name, module = "grouped_decode_kernel", triton_grouped.triton_kernels
    monkeypatch.setattr(module, name, Counted(name, getattr(module, name), launches))
    return launches


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("tokens", [1, 19])
def test_few_rows_of_all_projections_in_one_launch(tokens, dtypes, device, one_launch_for_few_rows):
    """Odd sizes, ranks and widths of each projection its own, an empty one, weights and factors by columns, with and
    without a bias and a base."""
    for base in (True, False):  # a big base would hide a wrong update
        case = make_grouped(tokens, 67, (48, 0, 7, 33), (20, 3, 64, 1), *DTYPES[dtypes], base=base, device=device)
        x, *groups = case.groups(plain_x=True)
        by_columns = [[t.t().contiguous().t() for t in group] for group in (groups[0], *groups[2:])]
        moved = [by_columns[0], [None] * 4, *by_columns[1:]]
        for weights, biases, lora_a, lora_b in (groups, moved):
            with torch.no_grad():
                y = grouped_lora_linear(x, weights, biases, lora_a, lora_b, case.scalings)
            for i, ours in enumerate(y):
                one = (x, weights[i], biases[i], lora_a[i], lora_b[i], case.scalings[i])
                assert_within_budget(ours, eager_lora_linear(*one), exact_lora_linear(*one), f"projection {i}")
    assert one_launch_for_few_rows == ["grouped_decode_kernel"] * 4


def test_the_choice_is_pure_and_few_rows_take_one_launch_where_their_columns_fill_the_gpu(monkeypatch):
    """Those of an 8B model do; not where K has to be split, nor large ranks."""
    monkeypatch.undo()
    choose = triton_grouped.config.choose
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        for rows, widths, rank in itertools.product((1, 64), ((4096, 1024, 1024), (14336, 14336)), (16, 64)):
            tiles = choose(rows, 4096, widths, rank, 2, capability)
            assert (tiles.path, tiles.split_k) == ("decode", 1)
            assert tiles == choose(rows, 4096, widths, rank, 2, capability)
        assert choose(16, 4096, (1024, 1024), 16, 2, capability).path == "apart"
        assert choose(16, 4096, (14336, 14336), 65, 2, capability).path == "apart"
        assert choose(16, 4096, (14336, 14336), 16, 2, capability, keep_h=True).path == "two_pass"
        for rows, rank, itemsize in itertools.product((65, 400, 8192), (1, 16, 64, 200), (2, 4)):
            assert choose(rows, 4096, (4096, 1024), rank, itemsize, capability).path == "two_pass"
        invariant = {choose(m, 64, (64, 32), 8, 2, capability, batch_invariant=True) for m in (1, 64, 65, 4000)}
        assert len(invariant) == 1


def test_few_rows_an_inf_in_one_projection_reaches_no_other(device, one_launch_for_few_rows):
    test_an_inf_in_one_projection_reaches_no_other(device)
    assert len(one_launch_for_few_rows) == 2


def test_an_inf_in_one_projection_reaches_no_other(device):
    case = make_grouped(20, 64, (48, 16), (4, 12), torch.float16, device=device)
    with torch.no_grad():
        clean = grouped_lora_linear(*case.args())
        case.lora_a[1][3, 5] = torch.inf
        y = grouped_lora_linear(*case.args())
    assert torch.equal(y[0], clean[0])
    assert not torch.isfinite(y[1]).all()


def test_batch_invariant_bits_are_those_of_one_projection(device):
    """Which are the same in any batch."""
    case = make_grouped(35, 96, (48, 32), (4, 20), torch.float16, device=device)
    with lk.use_backend("triton", batch_invariant=True), torch.no_grad():
        for rows in (slice(0, 1), slice(0, 35)):
            y = grouped_lora_linear(case.x[rows], *case.groups()[1:], case.scalings)
            for i, ours in enumerate(y):
                one = (group[i] for group in (*case.groups()[1:], case.scalings))
                assert torch.equal(ours, lk.ops.lora_linear(case.x[rows], *one))


@pytest.mark.parametrize("widths", [(0, 16), (16, 0)])
def test_nothing_to_compute(widths, device):
    case = make_grouped(6, 24, widths, (4, 2), device=device)
    assert [part.shape[1] for part in grouped_lora_linear(*case.args())] == list(widths)
    x = case.x.requires_grad_()
    (grad,) = torch.autograd.grad(sum(part.sum() for part in grouped_lora_linear(*case.args())), x)
    assert torch.isfinite(grad).all()
