"""Exact merge, unmerge and switch: every bit comes back, and every backend, instruction set and thread count gives
the bits of the reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exact_cases import BF16, F16, F32, GOLDEN, bits, check_golden, problem, same_bits, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_kernels as lk
from lora_kernels import _native

DTYPES = [F32, F16, BF16]
native = pytest.mark.skipif(not _native.cpu_available, reason=_native.cpu_reason)


def test_golden(backend):
    assert len(GOLDEN) == 12
    check_golden()


@native
def test_golden_on_every_instruction_set(isa_environment):
    """Four threads, subnormals flushed in the calling process."""
    for arguments in (["1", "cpu", "flush"], ["4", "cpu"]):
        env = {**isa_environment, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, str(Path(__file__).parent / "exact_cases.py"), *arguments]
        subprocess.run(command, env=env, check=True, timeout=120)


def test_golden_with_subnormals_flushed(backend):
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU can not flush subnormals")
    try:
        check_golden()
        assert torch.tensor(1e-38) * 0.1 == 0, "the setting of the thread is put back"
    finally:
        torch.set_flush_denormal(False)


KINDS = st.sampled_from(["wild", "steps", "zeros", 0.02, 1.0, 1e-30])


@native
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.sampled_from([(1, 1), (3, 5), (37, 129), (1, 4095), (2, 4096), (3, 2049), (200, 33), (2100, 1), (9, 700)]),
    rank=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    adapters=st.sampled_from(["weight's", F32]),
    kinds=st.tuples(KINDS, KINDS, KINDS),
    scaling=st.sampled_from([1.0, -0.73, 0.0, 1e-6, 37.5]),
    seed=st.integers(0, 2**20),
)
def test_there_and_back(shape, rank, dtype, adapters, kinds, scaling, seed):
    """Native and reference: the same bits, the same residual, and each undoes the other's merge."""
    weight, lora_a, lora_b, _ = problem(
        *shape, rank, dtype, dtype if adapters == "weight's" else F32, *kinds, seed=seed
    )
    adapter = lora_a, lora_b, scaling
    results = []
    for name in ("cpu", "reference"):
        merged = weight.clone()
        with lk.use_backend(name):
            try:
                results.append((merged, lk.ops.merge_exact_(merged, *adapter)))
            except ValueError:
                assert same_bits(merged, weight)
                results.append((merged, None))
    (fast, residual), (slow, expected) = results
    assert same_bits(fast, slow)
    if residual is None or expected is None:
        assert residual is expected
        return
    assert torch.equal(residual.body, expected.body)
    assert residual.body.numel() <= weight.numel() * weight.element_size() + 6 * max(1, weight.numel() // 2048 + 1)
    lk.ops.unmerge_exact_(fast, *adapter, expected)
    with lk.use_backend("reference"):
        lk.ops.unmerge_exact_(slow, *adapter, residual)
    assert same_bits(fast, weight)
    assert same_bits(slow, weight)


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_switch_gives_what_merging_into_the_original_gives(backend, dtype):
    for shape in ((33, 100), (3, 4500)):
        weight, *old = problem(*shape, 3, dtype)
        _, *new = problem(*shape, 7, dtype, dtype, seed=1)
        merged, want = weight.clone(), weight.clone()
        residual = lk.ops.merge_exact_(merged, *old)
        residual = lk.ops.switch_exact_(merged, old, new, residual)
        expected = lk.ops.merge_exact_(want, *new)
        assert same_bits(merged, want)
        assert torch.equal(residual.body, expected.body)
        assert residual.digest == expected.digest
        lk.ops.unmerge_exact_(merged, *new, residual)
        assert same_bits(merged, weight)


@native
@pytest.mark.parametrize("layout", ["columns", "sliced", "every second", "sliced columns"])
@pytest.mark.parametrize("shape", [(40, 100), (3, 5000)], ids=str)
def test_layouts(layout, shape):
    weight, *adapter = problem(*shape, 4, BF16)
    n, k = shape
    frame = torch.full((2 * n + 6, 2 * k + 6), 7.0, dtype=BF16)
    frame = frame.T.contiguous().T if "columns" in layout else frame
    view = frame[3 : 2 * n + 3 : 2, 3 : 2 * k + 3 : 2] if layout == "every second" else frame[3 : n + 3, 3 : k + 3]
    view.copy_(weight)
    before, plain = frame.clone(), weight.clone()
    expected = lk.ops.merge_exact_(plain, *adapter)
    residual = lk.ops.merge_exact_(view, *adapter)
    assert same_bits(view, plain)
    assert torch.equal(residual.body, expected.body)
    lk.ops.unmerge_exact_(view, *adapter, residual)
    assert same_bits(frame, before)


def test_a_stack_comes_apart_in_reverse(backend):
    weight, *_ = problem(50, 90, 1, BF16)
    adapters = [problem(50, 90, r, BF16, seed=r, b=0.02)[1:] for r in (1, 4, 9)]
    now = weight.clone()
    residuals = [lk.ops.merge_exact_(now, *adapter) for adapter in adapters]
    with pytest.raises(ValueError, match="residual: does not fit the weight"):
        lk.ops.unmerge_exact_(now, *adapters[0], residuals[0])
    for adapter, residual in zip(reversed(adapters), reversed(residuals), strict=True):
        lk.ops.unmerge_exact_(now, *adapter, residual)
    assert same_bits(now, weight)


@native
def test_many_random_operations():
    """Merge, unmerge and switch in random order: the original at the end, the plain way's bits on the way."""
    g = torch.Generator().manual_seed(3)
    for dtype in DTYPES:
        original = values((96, 200), dtype, 0.02, g)
        adapters = [problem(96, 200, 1 + i, dtype, seed=i, b=0.001 * 8**i)[1:] for i in range(4)]
        weight, current, residual = original.clone(), None, None
        for pick in torch.randint(0, 4, (150,), generator=g).tolist():
            if current is None:
                residual, current = lk.ops.merge_exact_(weight, *adapters[pick]), pick
            elif pick == current:
                lk.ops.unmerge_exact_(weight, *adapters[pick], residual)
                current = None
                assert same_bits(weight, original)
            else:
                residual = lk.ops.switch_exact_(weight, adapters[current], adapters[pick], residual)
                current = pick
        if current is not None:
            lk.ops.unmerge_exact_(weight, *adapters[current], residual)
        assert same_bits(weight, original)


@native
@pytest.mark.parametrize(
    ("dtype", "limits"), [(BF16, (0.06, 0.15, 0.35, 1.05)), (F32, (0.09, 0.22, 0.5, 1.3))], ids=str
)
def test_bits_per_weight(dtype, limits):
    for relative, limit in zip((0.008, 0.04, 0.16, 0.8), limits, strict=True):
        weight, lora_a, lora_b, _ = problem(512, 1024, 16, dtype, a=0.25, b=0.02 * relative)
        residual = lk.ops.merge_exact_(weight, lora_a, lora_b, 1.0)
        assert residual.bits_per_weight <= limit, relative


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_never_more_than_a_copy(dtype):
    """Half of the weights zero, an update that swamps the others."""
    for shape in ((128, 128), (16, 5000)):
        weight, lora_a, lora_b, _ = problem(*shape, 4, dtype, w="zeros", b=1.0)
        copy = weight.numel() * weight.element_size()
        residual = lk.ops.merge_exact_(weight * 1e-4, lora_a, lora_b, 100.0)
        assert residual.nbytes <= 1.02 * copy


@native
def test_the_layout_of_the_bits_does_not_depend_on_threads():
    weight, *adapter = problem(300, 3000, 5, BF16)
    made = []
    for threads in (1, 2, 5):
        before, merged = torch.get_num_threads(), weight.clone()
        torch.set_num_threads(threads)
        try:
            made.append((merged, lk.ops.merge_exact_(merged, *adapter).body))
        finally:
            torch.set_num_threads(before)
    for merged, body in made[1:]:
        assert torch.equal(bits(merged), bits(made[0][0]))
        assert torch.equal(body, made[0][1])


def test_empty(backend):
    for shape in ((0, 5), (5, 0), (0, 0)):
        weight, *adapter = problem(*shape, 2, BF16)
        lk.ops.unmerge_exact_(weight, *adapter, lk.ops.merge_exact_(weight, *adapter))
