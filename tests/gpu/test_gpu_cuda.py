"""The C++ CUDA kernels on a GPU: golden vectors, odd sizes against float64, lists, bits, graphs, two streams at once.

What every backend must do is in ``test_gpu_ops.py``; the same kernels run on the host in ``tests/cuda``.
"""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_kernels as lk
from lora_kernels.ops import dispatch
from lora_kernels.testing import (
    assert_within_budget,
    eager_lora_linear,
    eager_multi_lora_linear,
    exact_lora_linear,
    exact_multi_lora_linear,
    make_linear,
    make_multi,
)

from .replays import replay_reads_anew, streams_give_the_bits_of_one

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exact"))
from exact_cases import GOLDEN, problem, same_bits

pytestmark = pytest.mark.gpu
HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _cuda_backend():
    reason = dispatch.unavailable("cuda")
    if reason is not None:
        pytest.skip(f"backend cuda: {reason}")
    with lk.use_backend("cuda"):
        yield


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path):
    case = {name: tensor.cuda() for name, tensor in load_file(path).items()}
    weight, adapter = case["weight"].clone(), (case["lora_a"], case["lora_b"], case["scaling"])
    residual = lk.ops.merge_exact_(weight, *adapter)
    assert same_bits(weight, case["merged"])
    assert torch.equal(residual.body, case["body"])
    lk.ops.unmerge_exact_(weight, *adapter, residual)
    assert same_bits(weight, case["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(1024, 4096), (333, 5000), (4096, 300)])
def test_exact_merge_is_that_of_the_cpu(shape, dtype):
    for kind in (0.02, "wild"):
        weight, *adapter = problem(*shape, 16, dtype, w=kind, b=0.01 if kind != "wild" else 1e-6)
        there = [weight.cuda(), *(t.cuda() for t in adapter[:2]), adapter[2]]
        residual = lk.ops.merge_exact_(*there)
        with lk.use_backend("auto"):
            expected = weight.clone()
            cpu = lk.ops.merge_exact_(expected, *adapter)
        assert same_bits(there[0].cpu(), expected)
        assert torch.equal(residual.body.cpu(), cpu.body)
        lk.ops.unmerge_exact_(*there, residual)
        assert same_bits(there[0].cpu(), weight)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (33, 1031, 997, 5), (129, 4096, 264, 100), (2000, 130, 4100, 16)], ids=str
)
def test_odd_sizes(shape, dtype):
    args = make_linear(*shape, dtype, device="cuda").args()
    assert_within_budget(lk.ops.lora_linear(*args), eager_lora_linear(*args), exact_lora_linear(*args))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "shape", [(1, 4096, 4096, 16), (7, 14336, 4096, 16), (33, 4100, 1000, 5), (64, 4096, 264, 100)], ids=str
)
def test_few_rows(shape, dtype):
    case = make_linear(*shape, dtype, device="cuda")
    for weight in (case.weight, torch.zeros_like(case.weight)):
        args = (case.x, weight, *case.args()[2:])
        ours = lk.ops.lora_linear(*args)
        assert_within_budget(ours, eager_lora_linear(*args), exact_lora_linear(*args))
        assert all(torch.equal(lk.ops.lora_linear(*args), ours) for _ in range(50))


def _few_rows_of_several():
    case = make_multi(33, 4100, 1000, 16, 5, torch.bfloat16, device="cuda")
    plan = lk.ops.plan_batch(case.token_slots, case.slot_ranks, num_slots=5)
    banks = (case.a_bank, case.b_bank, case.slot_scalings)
    return case, lambda: lk.ops.multi_lora_linear(case.x, case.weight, case.bias, *banks, plan)


def test_few_rows_of_several_adapters():
    case, run = _few_rows_of_several()
    clean = run()
    args = (case.x, case.weight, case.bias, case.a_bank, case.b_bank, case.slot_scalings)
    slots = (case.token_slots, case.slot_ranks)
    assert_within_budget(clean, eager_multi_lora_linear(*args, *slots), exact_multi_lora_linear(*args, *slots))
    assert all(torch.equal(run(), clean) for _ in range(50))
    case.b_bank[2] = torch.nan
    others = case.token_slots != 2
    assert torch.equal(run()[others], clean[others])


def test_few_rows_in_a_graph_read_the_adapters_anew():
    case, run = _few_rows_of_several()
    replay_reads_anew(run, case.b_bank)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(33, 1031, 997, 5), (700, 4096, 2048, 16), (2000, 256, 4096, 64)], ids=str)
def test_gradient_of_x(shape, dtype):
    case = make_linear(*shape, dtype, device="cuda")
    dy = torch.randn(shape[0], shape[2], device="cuda").to(dtype)
    op, nothing = lk.ops.library.op("lora_linear_backward"), torch.empty(0, device="cuda")
    mask = torch.empty(0, dtype=torch.uint8, device="cuda")
    args = (dy, case.x, case.weight, case.lora_a, case.lora_b, case.scaling, nothing, mask, 0.0, None)
    ours, *_ = op(*args, True, False, False, False)
    exact = case.scaling.double() * (dy.double() @ case.lora_b.double() @ case.lora_a.double())
    eager = (dy @ case.lora_b @ case.lora_a) * case.scaling.to(dtype) + dy @ case.weight
    assert_within_budget(ours, eager, exact + dy.double() @ case.weight.double())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(33, 1031, 997, 5), (4096, 4096, 2048, 16), (5001, 256, 4096, 100)], ids=str)
def test_gradients_of_the_adapter(shape, dtype):
    case = make_linear(*shape, dtype, device="cuda")
    dy = torch.randn(shape[0], shape[2], device="cuda").to(dtype)

    def gradients(*tensors, linear=eager_lora_linear):
        x, weight, bias, lora_a, lora_b = (t.detach().clone() for t in tensors[:5])
        leaves = [lora_a.requires_grad_(), lora_b.requires_grad_()]
        y = linear(x, weight, bias, *leaves, tensors[5])
        return torch.autograd.grad(y, leaves, dy.to(y.dtype))

    ours = gradients(*case.args(), linear=lk.ops.lora_linear)
    exact = gradients(*(t.double() for t in case.args()))
    for found, eager, true in zip(ours, gradients(*case.args()), exact, strict=True):
        assert_within_budget(found, eager, true)
    for _ in range(20):
        assert all(map(torch.equal, gradients(*case.args(), linear=lk.ops.lora_linear), ours))


def _list(count=100):
    cases = [
        make_linear(1, 512 + 8 * (i % 5), 300 + i, 16, torch.bfloat16, device="cuda", seed=i) for i in range(count)
    ]
    return [case.weight for case in cases], [(case.lora_a, case.lora_b, case.scaling) for case in cases]


def test_a_list_gives_the_bits_of_one_after_the_other():
    weights, adapters = _list()
    alone = [lk.ops.merge_(weight.clone(), *adapter) for weight, adapter in zip(weights, adapters, strict=True)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        lk.ops.merge_list_(weights, adapters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, weights, alone))


def test_a_list_in_a_graph_reads_the_adapters_anew():
    weights, adapters = _list()
    kept = [weight.clone() for weight in weights]
    lk.ops.merge_list_(weights, adapters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lk.ops.merge_list_(weights, adapters)
    for (_, lora_b, _), weight, before in zip(adapters, weights, kept, strict=True):
        lora_b.mul_(-2.0)
        weight.copy_(before)
    graph.replay()
    expected = [lk.ops.merge_(weight, *adapter) for weight, adapter in zip(kept, adapters, strict=True)]
    assert all(map(torch.equal, weights, expected))


@pytest.mark.parametrize("rows", [300, 9])
def test_two_streams_at_once_give_the_bits_of_one(rows):
    single = make_linear(rows, 2048, 1024, 16, torch.bfloat16, device="cuda")
    several = make_multi(rows, 2048, 1024, 16, 5, torch.bfloat16, device="cuda")
    plan = lk.ops.plan_batch(several.token_slots, several.slot_ranks, num_slots=5)
    banks = (several.a_bank, several.b_bank, several.slot_scalings)
    calls = (
        lambda: lk.ops.lora_linear(*single.args()),
        lambda: lk.ops.multi_lora_linear(several.x, several.weight, several.bias, *banks, plan),
    )
    streams_give_the_bits_of_one(calls)
