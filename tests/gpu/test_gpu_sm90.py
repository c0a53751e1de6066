"""The CUDA kernel of sm_90a on a Hopper GPU: float64 at real and odd sizes, several adapters, bits, graphs, streams."""

import functools

import pytest
import torch

import lora_kernels as lk
from lora_kernels import _native
from lora_kernels.check import eager_multi, exact_multi
from lora_kernels.ops import dispatch
from lora_kernels.testing import assert_within_budget, eager_lora_linear, exact_lora_linear, make_linear, make_multi

from .replays import replay_reads_anew, streams_give_the_bits_of_one

pytestmark = pytest.mark.gpu
HALF = [torch.float16, torch.bfloat16]
# M, K, N, R; the first is for compute-sanitizer, too.
SHAPES = [(300, 256, 4096, 16), (1000, 4096, 4096, 16), (8192, 4096, 4096, 64), (2048, 4096, 14336, 128)]
SHAPES += [(2777, 4104, 5000, 13), (1100, 72, 3200, 1)]


@pytest.fixture(autouse=True)
def _cuda_backend():
    reason = dispatch.unavailable("cuda")
    if reason is not None:
        pytest.skip(f"backend cuda: {reason}")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU is not of compute capability 9.0")
    with lk.use_backend("cuda"):
        yield


def _chosen(m, k, n, r):
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    return _native.module.cuda_sm90_cols(m, n, k, r, sms)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape, dtype):
    assert _chosen(*shape) > 0
    case = make_linear(*shape, dtype, device="cuda")
    for weight in (case.weight, torch.zeros_like(case.weight)):
        args = (case.x, weight, *case.args()[2:])
        ours = lk.ops.lora_linear(*args)
        assert_within_budget(ours, eager_lora_linear(*args), exact_lora_linear(*args))
        assert all(torch.equal(lk.ops.lora_linear(*args), ours) for _ in range(20))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_x(shape, dtype):
    m, k, n, r = shape
    case = make_linear(m, n, k, r, dtype, device="cuda")  # dx has n columns, then
    assert _chosen(m, k, n, r) > 0
    dy = torch.randn(m, k, device="cuda").to(dtype)
    x, *rest = (t.detach() for t in (case.x, case.weight, case.lora_a, case.lora_b))
    weight, lora_a, lora_b = rest

    def gradient(run, cast):
        leaf = cast(x).requires_grad_()
        y = run(leaf, cast(weight), None, cast(lora_a), cast(lora_b), case.scaling)
        return torch.autograd.grad(y, leaf, cast(dy))[0]

    eager, exact = gradient(eager_lora_linear, torch.clone), gradient(exact_lora_linear, torch.Tensor.double)
    assert_within_budget(gradient(lk.ops.lora_linear, torch.clone), eager, exact)


def _several(shape, slots, segments):
    case = make_multi(*shape, slots, torch.bfloat16, device="cuda")
    if segments:
        case.token_slots = torch.arange(shape[0], device="cuda") // 400 % (slots + 1) - 1
    plan = lk.ops.plan_batch(case.token_slots, case.slot_ranks, num_slots=slots)
    banks = (case.a_bank, case.b_bank, case.slot_scalings)
    return case, lambda: lk.ops.multi_lora_linear(case.x, case.weight, case.bias, *banks, plan)


@pytest.mark.parametrize("segments", [False, True], ids=["mixed", "segments"])
@pytest.mark.parametrize(
    ("shape", "slots"), [((300, 256, 4096, 16), 5), ((4096, 4096, 4096, 16), 8), ((2500, 1032, 5000, 35), 60)], ids=str
)
def test_several_adapters(shape, slots, segments):
    assert _chosen(*shape) > 0
    case, run = _several(shape, slots, segments)
    clean = run()
    assert_within_budget(clean, eager_multi(case), exact_multi(case))
    assert all(torch.equal(run(), clean) for _ in range(20))
    base, others = case.token_slots == -1, case.token_slots != 2
    nothing = (torch.zeros_like(case.a_bank[0]), torch.zeros_like(case.b_bank[0]), torch.zeros((), device="cuda"))
    assert torch.equal(clean[base], lk.ops.lora_linear(case.x, case.weight, case.bias, *nothing)[base])
    case.a_bank[2], case.b_bank[2] = torch.inf, torch.nan
    assert torch.equal(run()[others], clean[others])


def test_a_graph_reads_the_adapters_anew():
    case, run = _several((600, 2048, 4096, 16), 5, False)
    replay_reads_anew(run, case.b_bank)


def test_two_streams_at_once():
    cases = [make_linear(1000, 4096, 4096, 16, torch.bfloat16, device="cuda", seed=seed) for seed in range(2)]
    streams_give_the_bits_of_one([functools.partial(lk.ops.lora_linear, *case.args()) for case in cases])
