"""Training on Triton on a GPU: gradients at real sizes, the mask, CUDA graphs, bits, no host sync, several adapters."""

import pytest
import torch
import torch.utils.checkpoint

import lora_kernels as lk
from lora_kernels.ops import dispatch
from lora_kernels.ops.linear.dropout import dropout_mask, unpack_mask
from lora_kernels.testing import (
    DTYPES,
    assert_within_budget,
    eager_lora_linear,
    exact_lora_linear,
    make_grouped,
    make_linear,
    make_multi,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("triton_on_a_gpu")]


def _gradients(function, case, dtype=None):
    leaves = [getattr(case, n).detach().to(dtype or getattr(case, n).dtype) for n in ("x", "lora_a", "lora_b")]
    x, lora_a, lora_b = (leaf.requires_grad_() for leaf in leaves)
    weight, bias = (t.to(dtype or t.dtype) for t in (case.weight, case.bias))
    y = function(x, weight, bias, lora_a, lora_b, case.scaling)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to("cuda", case.x.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "shape", [(33, 4096, 1024, 16), (700, 2048, 5632, 64), (4096, 4096, 4096, 16), (515, 1031, 997, 130)]
)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_gradients_at_real_sizes(shape, dtypes, p):
    case = make_linear(*shape, *dtypes, device="cuda")
    seed = torch.tensor(1234567890123, device="cuda")
    keep = unpack_mask(dropout_mask(seed, *shape[:2], p), shape[1]) / (1 - p) if p else None
    ours = _gradients(lambda *args: lk.ops.lora_linear(*args, dropout_p=p, dropout_seed=seed), case)
    eager = _gradients(lambda *args: eager_lora_linear(*args, keep=keep), case)
    exact = _gradients(lambda *args: exact_lora_linear(*args, keep=keep), case, torch.float64)
    for name, *results in zip(("y", "dx", "da", "db"), ours, eager, exact, strict=True):
        assert_within_budget(*results, name)


def test_the_mask_is_that_of_the_cpu():
    for seed in (0, -1, 2**62 + 7):
        ours = torch.ops.lora_kernels.dropout_mask(torch.tensor(seed, device="cuda"), 513, 1029, 0.1)
        assert torch.equal(ours.cpu(), dropout_mask(torch.tensor(seed), 513, 1029, 0.1))


def test_the_same_call_gives_the_same_bits():
    case = make_linear(2048, 2048, 2048, 16, torch.bfloat16, device="cuda")
    first = _gradients(lk.ops.lora_linear, case)
    for _ in range(5):
        assert all(map(torch.equal, _gradients(lk.ops.lora_linear, case), first))


def test_a_step_in_a_cuda_graph_reads_the_adapters_and_the_seed_anew():
    case = make_linear(512, 1024, 768, 16, torch.bfloat16, device="cuda")
    seed = torch.tensor(5, device="cuda")

    def step():
        return _gradients_of_ones(case, seed)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (6, 7):
        seed.fill_(value)
        case.lora_b.data.mul_(-2.0)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        assert all(map(torch.equal, replayed, step()))


@pytest.mark.parametrize("op", ["lora_linear", "grouped_lora_linear"])
def test_a_training_step_compiles_as_one_graph(op):
    """Forward with its gradients, and with dropout where the op has it: the bits of eager."""
    if op == "lora_linear":
        case, seed = make_linear(300, 1024, 768, 16, torch.bfloat16, device="cuda"), torch.tensor(5, device="cuda")
        leaves = [tensor.requires_grad_() for tensor in (case.x, case.lora_a, case.lora_b)]
        run = lambda: lk.ops.lora_linear(*case.args(), dropout_p=0.1, dropout_seed=seed)  # noqa: E731
    else:
        case = make_grouped(300, 1024, (768, 256), (16, 8), torch.bfloat16, device="cuda")
        leaves = [tensor.requires_grad_() for tensor in (case.x, *case.lora_a, *case.lora_b)]
        run = lambda: torch.cat(lk.ops.grouped_lora_linear(*case.args()), 1)  # noqa: E731
    expected = run()
    found = torch.compile(run, fullgraph=True)()
    dy = torch.ones_like(expected)
    assert torch.equal(found, expected)
    pairs = zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True)
    assert all(torch.equal(ours, eager) for ours, eager in pairs)


def test_checkpointing_draws_the_same_mask_again():
    case = make_linear(300, 1024, 768, 16, torch.bfloat16, device="cuda")
    a, found = case.lora_a.requires_grad_(), []

    def run(x):
        return lk.ops.lora_linear(x, case.weight, case.bias, a, case.lora_b, case.scaling, dropout_p=0.5)

    for checkpointed in (False, True):
        torch.manual_seed(5)
        y = torch.utils.checkpoint.checkpoint(run, case.x, use_reentrant=False) if checkpointed else run(case.x)
        found.append(torch.autograd.grad(y.float().square().sum(), a)[0])
    assert torch.equal(*found)


def _gradients_of_ones(case, seed):
    leaves = [tensor.detach().requires_grad_() for tensor in (case.x, case.lora_a, case.lora_b)]
    y = lk.ops.lora_linear(
        leaves[0], case.weight, case.bias, *leaves[1:], case.scaling, dropout_p=0.1, dropout_seed=seed
    )
    return torch.autograd.grad(y, leaves, torch.ones_like(y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_several_adapters_agree_with_one_at_a_time_and_wait_for_nothing(dtype):
    case = make_multi(1000, 1024, 768, 16, 5, dtype, device="cuda")
    plan = lk.ops.plan_batch(case.token_slots, num_slots=5)
    dy = torch.randn(1000, 768, device="cuda").to(dtype)
    adapters = list(case.a_bank.unbind()), list(case.b_bank.unbind())

    def run():
        grads = [[torch.full_like(t, torch.nan) for t in tensors] for tensors in adapters]
        rows = plan.row_order, plan.segment_starts
        op = dispatch.select("multi_lora_backward", case.x)
        dx = op(dy, case.x, case.weight, *adapters, case.slot_scalings, *rows, None, *grads, True)
        return [dx, *grads[0], *grads[1]]

    found = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, found, again))
    with lk.use_backend("reference"):
        eager = run()
    exact = _exact(case, dy)
    for ours, theirs, true in zip(found, eager, exact, strict=True):
        assert_within_budget(ours, theirs, true)


def _exact(case, dy):
    dx = dy.double() @ case.weight.double()
    grads = [torch.zeros_like(bank).double() for bank in (case.a_bank, case.b_bank)]
    for slot in range(5):
        mine = case.token_slots == slot
        scaled, x = case.slot_scalings[slot].double() * dy[mine].double(), case.x[mine].double()
        a, b = case.a_bank[slot].double(), case.b_bank[slot].double()
        dx[mine] += scaled @ b @ a
        grads[0][slot] = (scaled @ b).t() @ x
        grads[1][slot] = scaled.t() @ (x @ a.t())
    return [dx, *grads[0], *grads[1]]
