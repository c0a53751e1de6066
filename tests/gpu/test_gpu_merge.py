"""Merging on each GPU backend at real sizes: float64, layouts of the weight, what is not written, bits."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.testing import DTYPES, assert_within_budget, exact_merge, make_linear

# K, N, rank
SHAPES = ((4096, 4096, 16), (14336, 4096, 64), (1031, 997, 130), (1, 5, 1))


def _eager(weight, *terms):
    for lora_a, lora_b, scaling in terms:
        weight = weight + ((lora_b @ lora_a) * float(scaling)).to(weight.dtype)
    return weight


def _terms(case, sign=1.0):
    return case.lora_a, case.lora_b, sign * case.scaling


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_within_budget(dtypes, shape, needs):
    needs("merge_", "switch_")
    for base in (True, False):  # a big base would hide a wrong update
        case = make_linear(1, *shape, *DTYPES[dtypes], base=base, device="cuda")
        other = make_linear(1, *shape, *DTYPES[dtypes], seed=1, device="cuda")
        weight = case.weight
        results = {
            "merge_": (lk.ops.merge_(weight.clone(), *_terms(case)), (_terms(case),)),
            "unmerge_": (lk.ops.unmerge_(weight.clone(), *_terms(case)), (_terms(case, -1.0),)),
            "switch_": (
                lk.ops.switch_(weight.clone(), _terms(case), _terms(other)),
                (_terms(case, -1.0), _terms(other)),
            ),
        }
        for name, (ours, terms) in results.items():
            assert_within_budget(ours, _eager(weight, *terms), exact_merge(weight, *terms), f"{name}, base {base}")


@pytest.mark.parametrize("layout", ["rows of a larger one", "by columns", "every second column"])
def test_only_the_weight_is_written(layout, gpu_backend, needs):
    needs("merge_")
    case = make_linear(1, 1024, 768, 16, torch.bfloat16, device="cuda")
    shape = {"by columns": (1024, 768), "every second column": (768, 2048)}.get(layout, (800, 1040))
    memory = torch.full(shape, 7.0, dtype=torch.bfloat16, device="cuda")
    views = {"by columns": memory.t(), "every second column": memory[:, ::2]}
    weight = views.get(layout, memory[16:784, 8:1032])
    if gpu_backend == "cuda" and weight.stride(1) != 1:
        pytest.skip("the CUDA kernels refuse columns apart")
    weight.copy_(case.weight)
    lk.ops.merge_(weight, *_terms(case))
    assert torch.equal(weight, lk.ops.merge_(case.weight.clone(), *_terms(case)))
    weight.fill_(7.0)
    assert (memory == 7.0).all()


def test_the_same_call_gives_the_same_bits(needs):
    needs("merge_", "switch_")
    case, other = (make_linear(1, 4096, 4096, 16, torch.bfloat16, device="cuda", seed=seed) for seed in (0, 1))
    for run in (
        lambda: lk.ops.merge_(case.weight.clone(), *_terms(case)),
        lambda: lk.ops.switch_(case.weight.clone(), _terms(case), _terms(other)),
    ):
        first = run()
        assert all(torch.equal(run(), first) for _ in range(5))


def test_a_safe_merge_that_would_overflow_changes_nothing(needs):
    needs("merge_", "merge_is_finite")
    case = make_linear(1, 512, 256, 4, torch.float16, device="cuda")
    case.lora_b[100] = 6e4
    before = case.weight.clone()
    with pytest.raises(ValueError, match="would hold Inf or NaN"):
        lk.ops.merge_(case.weight, case.lora_a * 100, case.lora_b, case.scaling, safe=True)
    assert torch.equal(case.weight, before)
