"""The exact merge on CUDA, its source run on the host: golden vectors, the CPU's bits and bytes, damage, rollback."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_kernels import _native
from lora_kernels.ops import library as ops
from lora_kernels.ops.exact.reference import KERNELS as REFERENCE
from lora_kernels.ops.exact.reference import MALFORMED, MISMATCH, NOT_FINITE, OK

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exact"))
from exact_cases import BF16, F16, F32, GOLDEN, problem, same_bits

pytestmark = pytest.mark.usefixtures("library")


def _case(*args, **options):
    weight, a, b, scale = problem(*args, **options)
    return weight, a, b, torch.tensor(scale)


def _cuda(name, *args):
    return ops.cuda_op(name)(*args)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, schedule):
    case = load_file(path)
    weight, adapter = case["weight"].clone(), (case["lora_a"], case["lora_b"], case["scaling"])
    body, status = _cuda("merge_exact_", weight, *adapter)
    assert status.tolist() == [OK, -1]
    assert same_bits(weight, case["merged"])
    assert torch.equal(body, case["body"])
    assert _cuda("unmerge_exact_", weight, *adapter, body).tolist() == [OK, -1]
    assert same_bits(weight, case["weight"])


# One block; a last block of two halves; several columns of blocks and more rows than a thread block; narrow.
SHAPES = [(1, 1), (3, 2048), (6, 4095), (5, 4097), (2, 6200), (1, 2047), (40, 130), (2100, 2), (0, 7)]


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_and_bytes_are_the_references(shape, dtype):
    for kind in (0.02, "wild", "zeros"):
        weight, *adapter = _case(*shape, 3, dtype, w=kind, b=0.01, a=0.25 if kind != "wild" else 1e-3)
        ours, theirs = weight.clone(), weight.clone()
        body, status = _cuda("merge_exact_", ours, *adapter)
        their_body, their_status = REFERENCE["merge_exact_"](theirs, *adapter)
        assert status.tolist() == their_status.tolist(), kind
        assert same_bits(ours, theirs), kind
        assert torch.equal(body, their_body), kind
        if status[0] == OK:
            assert _cuda("unmerge_exact_", ours, *adapter, body).tolist() == [OK, -1]
            assert same_bits(ours, weight), kind


SIZES = st.one_of(st.sampled_from(["wild", "steps", "zeros"]), st.integers(-140, 60).map(lambda power: 2.0**power))


@pytest.mark.skipif(not _native.cpu_available, reason=_native.cpu_reason)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from([F32, F16, BF16]),
    shape=st.sampled_from([(1, 1), (3, 50), (40, 70), (2, 2100), (1, 4095)]),
    rank=st.integers(1, 5),
    size=SIZES,
    update=st.one_of(SIZES, st.integers(-30, 12)),
    seed=st.integers(0, 2**20),
)
def test_bits_and_bytes_are_the_cpus_at_every_magnitude(dtype, shape, rank, size, update, seed):
    """An integer `update` is the power of two of the update's size beside that of the weights."""
    if isinstance(update, int):
        update = 2.0**update * (size if isinstance(size, float) else 1.0)
    weight, *adapter = _case(*shape, rank, dtype, w=size, a=1.0, b=update, seed=seed)
    ours, theirs = weight.clone(), weight.clone()
    body, status = _cuda("merge_exact_", ours, *adapter)
    their_body, their_status = torch.ops.lora_kernels.merge_exact_(theirs, *adapter)
    assert status.tolist() == their_status.tolist()
    assert same_bits(ours, theirs)
    assert torch.equal(body, their_body)
    if status[0] == OK:
        assert _cuda("unmerge_exact_", ours, *adapter, body).tolist() == [OK, -1]
        assert torch.ops.lora_kernels.unmerge_exact_(theirs, *adapter, body).tolist() == [OK, -1]
        assert same_bits(ours, weight)
        assert same_bits(theirs, weight)


def test_switch_gives_what_merging_the_new_one_gives():
    weight, *old = _case(6, 4100, 4, BF16)
    _, *new = _case(6, 4100, 7, BF16, BF16, seed=1)
    merged, expected = weight.clone(), weight.clone()
    body, _ = _cuda("merge_exact_", merged, *old)
    made, status = _cuda("switch_exact_", merged, *old, *new, body)
    their_body, _ = REFERENCE["merge_exact_"](expected, *new)
    assert status.tolist() == [OK, -1]
    assert same_bits(merged, expected)
    assert torch.equal(made, their_body)


def test_a_switch_that_is_refused_leaves_the_first_merge():
    weight, *old = _case(6, 2100, 4, F16)
    body, _ = _cuda("merge_exact_", weight, *old)
    before = weight.clone()
    new = (torch.full((1, 2100), 6e4), torch.full((6, 1), 6e4), torch.tensor(1.0))
    _, status = _cuda("switch_exact_", weight, *old, *new, body)
    assert status.tolist() == [NOT_FINITE, 0]
    assert same_bits(weight, before)
    assert _cuda("unmerge_exact_", weight, *old, body).tolist() == [OK, -1]


@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_is_refused_and_nothing_changes(where):
    case = list(_case(6, 2100, 4, BF16))
    case[where].view(-1)[-1] = torch.inf
    before = case[0].clone()
    body, status = _cuda("merge_exact_", *case)
    assert status.tolist() == [NOT_FINITE, 5 if where == 0 else -1]
    assert body.numel() == 0
    assert same_bits(case[0], before)


def test_damage_is_found_before_anything_is_written():
    weight, *adapter = _case(5, 4200, 4, BF16, b=0.02)
    body, _ = _cuda("merge_exact_", weight, *adapter)
    merged, blocks = weight.clone(), 10
    for at in (6 * blocks - 1, body.numel() - 1):  # a checksum, a block's bytes
        damaged = body.clone()
        damaged[at] ^= 1
        assert _cuda("unmerge_exact_", weight, *adapter, damaged).tolist() == [MISMATCH, 9]
        assert same_bits(weight, merged)
    for damaged in (body[:-1], body[:7], body[:0], torch.cat([body, body[:1]])):
        assert _cuda("unmerge_exact_", weight, *adapter, damaged.clone()).tolist() == [MALFORMED, -1]
        assert same_bits(weight, merged)
    weight[2, 3] += 1
    changed = weight.clone()
    assert _cuda("unmerge_exact_", weight, *adapter, body).tolist() == [MISMATCH, 4]
    assert same_bits(weight, changed)


def test_of_several_faults_the_first_is_told(set_order):
    """Whichever block runs first: each looks for what comes before all that was found."""
    weight, *adapter = _case(24, 2048, 2, BF16, b=0.02)
    merged = weight.clone()
    body, _ = _cuda("merge_exact_", merged, *adapter)
    for seed in (0, 3, 9, 10):
        set_order(seed, True)
        wrong = weight.clone()
        wrong[6:, 5] = torch.inf
        assert _cuda("merge_exact_", wrong, *adapter)[1].tolist() == [NOT_FINITE, 6]
        damaged = merged.clone()
        damaged[7:, 5] += 1
        assert _cuda("unmerge_exact_", damaged, *adapter, body).tolist() == [MISMATCH, 7]


def test_a_refused_wait_is_no_error_of_the_next_call(library):
    weight, *adapter = _case(3, 2048, 2, BF16)
    library.lk_emulate_capturing(True)
    with pytest.raises(RuntimeError, match="the stream is capturing"):
        _cuda("merge_exact_", weight, *adapter)
    library.lk_emulate_capturing(False)
    _cuda("merge_", weight, *adapter, 1.0)


def test_strides():
    weight, a, b, scale = _case(9, 2300, 3, BF16)
    expected = weight.clone()
    expected_body, _ = _cuda("merge_exact_", expected, a, b, scale)
    room = torch.full((2300, 30), torch.nan, dtype=BF16)
    view = room[:, 3:21:2].t()
    view.copy_(weight)
    body, _ = _cuda("merge_exact_", view, a.t().contiguous().t(), b.t().contiguous().t(), scale)
    assert same_bits(view, expected)
    assert torch.equal(body, expected_body)
    view.fill_(torch.nan)
    assert room.isnan().all()
