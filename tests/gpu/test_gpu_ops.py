"""Every op on each GPU backend: against float64 at real sizes, in CUDA graphs, compiled, to the bit, without a sync."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.check import CHECKS, DTYPES, NEEDS
from lora_kernels.ops import cuda_choice
from lora_kernels.ops.dora.api import row_norm
from lora_kernels.testing import (
    assert_within_budget,
    eager_lora_embedding,
    eager_lora_linear,
    embedding_results,
    exact_lora_linear,
    make_embedding,
    make_grouped,
    make_linear,
    make_multi,
)

from .calls import CALLS

# M, K, N, R
SHAPES = (
    (1, 4096, 4096, 16),
    (16, 4096, 1024, 64),
    (64, 14336, 4096, 8),
    (300, 4096, 4096, 16),
    (700, 2048, 5632, 128),
)
# Rows of 1025 that are compared with the same rows of all.
PARTS = (slice(0, 1), slice(7, 40), slice(100, 612), slice(512, 1025))


def test_every_check_says_what_it_needs():
    assert set(NEEDS) == set(CHECKS)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("op", CHECKS)
def test_within_budget_at_real_sizes(op, dtypes, needs):
    needs(*NEEDS[op])
    for shape in SHAPES:
        for index, (ours, eager, exact) in enumerate(CHECKS[op](shape, *DTYPES[dtypes], "cuda")):
            assert_within_budget(ours, eager, exact, f"{op} {shape}, result {index}")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("tokens", "embeddings", "rank"), [(1, 32000, 16), (4096, 32000, 16), (700, 50, 100)])
def test_embeddings_are_within_budget_at_real_sizes(tokens, embeddings, rank, dtypes, needs):
    needs("lora_embedding", "lora_embedding_backward")
    case = make_embedding(tokens, embeddings, 4096, rank, *DTYPES[dtypes], device="cuda")
    found = embedding_results(lk.ops.lora_embedding, case, padding_idx=3)
    expected = [embedding_results(eager_lora_embedding, case, dtype, 3) for dtype in (None, torch.float64)]
    for name, *results in zip(("y", "da", "db"), found, *expected, strict=True):
        assert_within_budget(*results, name)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096, 16), (1031, 997, 130)], ids=str)
def test_row_norms_at_real_sizes(shape, dtypes, needs):
    needs("row_norm")
    case = make_linear(1, *shape, *DTYPES[dtypes], device="cuda")
    update = case.lora_b.double() @ case.lora_a.double()
    exact = (case.weight.double() + case.scaling.double() * update).norm(dim=1)
    ours = row_norm(case.weight, case.lora_a, case.lora_b, case.scaling)
    assert bool(((ours - exact).abs() <= 8 * torch.finfo(torch.float32).eps * exact).all())


@pytest.mark.parametrize("shape", [(1, 1), (65, 129), (1000, 2048)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_is_finite_sees_every_place_and_writes_nothing(dtype, shape, needs):
    needs("merge_is_finite")
    check = lk.ops.library.op("merge_is_finite")
    outputs, features = shape
    case = make_linear(1, features, outputs, 19, dtype, device="cuda")
    before = case.weight.clone()
    assert check(*_merge_terms(case), 1.0)
    assert check(*_merge_terms(case), -1.0)
    assert torch.equal(case.weight, before)
    for tensor in (case.weight, case.lora_a, case.lora_b):
        for place in {(0, 0), (tensor.shape[0] - 1, tensor.shape[1] - 1)}:
            kept = tensor[place].clone()
            for value in (float("inf"), -float("inf"), float("nan")):
                tensor[place] = value
                assert not check(*_merge_terms(case), 1.0), (place, value)
            tensor[place] = kept
    # Finite factors whose product takes one element over the edge, or away from it.
    most = torch.finfo(dtype).max
    case.weight[-1, -1], case.lora_a[:, -1], case.lora_b[-1] = most, 1.0, most / 64
    one = torch.ones((), device="cuda")
    assert not check(*_merge_terms(case)[:3], one, 1.0)
    assert check(*_merge_terms(case)[:3], one, -1.0)


def _merge_terms(case):
    return case.weight, case.lora_a, case.lora_b, case.scaling


@pytest.mark.parametrize("op", CALLS)
def test_cuda_graph_replays_with_changed_adapters(op, needs):
    call = CALLS[op](torch.bfloat16)
    needs(*call.needs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        call.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        result = call.run()
    for factor in (0.5, -3.0):
        with torch.no_grad():
            for tensor in call.adapters:
                tensor.mul_(factor)
        graph.replay()
        replayed = result.clone()
        with torch.no_grad():
            assert torch.equal(replayed, call.run())


@pytest.mark.parametrize("op", [name for name in CALLS if "gradients" not in name and "dropout" not in name])
def test_compiles_as_one_graph(op, needs):
    call = CALLS[op](torch.bfloat16)
    needs(*call.needs)
    with torch.no_grad():
        expected = call.run().clone()
        assert torch.equal(torch.compile(call.run, fullgraph=True)(), expected)


@pytest.mark.parametrize("op", CALLS)
def test_the_same_call_gives_the_same_bits(op, needs):
    call = CALLS[op](torch.bfloat16)
    needs(*call.needs)
    with torch.no_grad():
        first = call.run().clone()
        for _ in range(5):
            assert torch.equal(call.run(), first)


@pytest.mark.parametrize("op", CALLS)
def test_no_call_waits_for_the_gpu(op, needs):
    call = CALLS[op](torch.bfloat16)
    needs(*call.needs)
    with torch.no_grad():
        call.run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rank", [16, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batch_invariant_rows_have_the_same_bits_in_any_batch(dtype, rank, gpu_backend, needs):
    needs("lora_linear", "lora_add_")
    case = make_linear(1025, 2048, 3072, rank, dtype, device="cuda")
    with lk.use_backend(gpu_backend, batch_invariant=True):
        whole = lk.ops.lora_linear(*case.args())
        adapter = (case.lora_a, case.lora_b, case.scaling)
        added = lk.ops.lora_add_(torch.zeros_like(whole), case.x, *adapter)
        for rows in PARTS:
            part = case.x[rows]
            assert torch.equal(lk.ops.lora_linear(part, case.weight, case.bias, *adapter), whole[rows])
            assert torch.equal(lk.ops.lora_add_(torch.zeros_like(whole[rows]), part, *adapter), added[rows])


def test_batch_invariant_rows_of_many_adapters(gpu_backend, needs):
    needs("multi_lora_linear")
    case = make_multi(1025, 2048, 3072, 16, 6, torch.bfloat16, device="cuda")

    def run(rows):
        plan = lk.ops.plan_batch(case.token_slots[rows], case.slot_ranks, num_slots=6)
        banks = (case.a_bank, case.b_bank, case.slot_scalings)
        return lk.ops.multi_lora_linear(case.x[rows], case.weight, case.bias, *banks, plan)

    with lk.use_backend(gpu_backend, batch_invariant=True):
        whole = run(slice(None))
        assert all(torch.equal(run(rows), whole[rows]) for rows in PARTS)


def test_batch_invariant_rows_of_projections_that_share_their_input(gpu_backend, needs):
    needs("grouped_lora_linear", "grouped_lora_backward")
    case = make_grouped(1025, 2048, (2048, 512, 512), (16, 16, 8), torch.bfloat16, device="cuda")

    def run(rows):
        x = case.x[rows].clone().requires_grad_()
        y = lk.ops.grouped_lora_linear(x, *case.groups()[1:], case.scalings)
        return torch.cat([*y, *torch.autograd.grad(y, x, [torch.ones_like(part) for part in y])], 1).detach()

    with lk.use_backend(gpu_backend, batch_invariant=True):
        whole = run(slice(None))
        assert all(torch.equal(run(rows), whole[rows]) for rows in PARTS)


def test_offsets_beyond_two_to_the_31(needs):
    """An output and an input of more than 2³¹ elements."""
    needs("lora_linear")
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    rows = 2**31 // 4096 + 300
    case = make_linear(300, 4096, 4096, 16, torch.bfloat16, device="cuda")
    x = torch.zeros((rows, 4096), dtype=torch.bfloat16, device="cuda")
    x[:300], x[-300:] = case.x, case.x
    y = lk.ops.lora_linear(x, *case.args()[1:])
    assert torch.equal(y[-300:], y[:300])
    assert_within_budget(y[-300:], eager_lora_linear(*case.args()), exact_lora_linear(*case.args()))


def test_auto_takes_the_reference_for_what_no_gpu_has_proven(gpu_backend, monkeypatch):
    monkeypatch.setattr(cuda_choice, "calls", {})
    case = make_linear(4, 64, 32, 4, device="cuda")
    with lk.use_backend("auto"):
        lk.ops.lora_linear(*case.args())
    ran = {backend for name, backend, _ in cuda_choice.calls if name == "lora_linear"}
    proven = {b for b in cuda_choice.PREFERENCE if cuda_choice.proven(b, "lora_linear", case.x.device.index)}
    assert ran & (proven or {"reference"})
