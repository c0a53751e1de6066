"""The native CPU merge family, called as raw ops: every dtype, shape, layout and instruction set against float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_kernels  # noqa: F401  (defines and loads the ops)
from lora_kernels import _native

pytestmark = pytest.mark.skipif(not _native.cpu_available, reason=_native.cpu_reason)
OPS = torch.ops.lora_kernels
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [
    pytest.param(w, a, b, id=f"{w}-{a}-{b}".replace("torch.", ""))
    for w, a, b in [
        (F32, F32, F32),
        (BF16, BF16, BF16),
        (BF16, F32, F32),
        (BF16, BF16, F32),
        (F16, F16, F16),
        (F16, F32, F16),
    ]
]
SHAPES = [(1, 1, 1), (1, 97, 2), (97, 1, 3), (6, 64, 16), (53, 127, 7), (101, 64, 33), (40, 200, 512), (130, 389, 16)]
LAYOUTS = ["rows", "columns", "sliced", "sliced columns", "every third"]


def layout(weight, kind):
    """(frame, view): `view` holds weight's values, laid out as `kind` says, inside `frame`."""
    n, k = weight.shape
    if kind in ("columns", "sliced columns"):
        frame, view = layout(weight.T, "rows" if kind == "columns" else "sliced")
        return frame, view.T
    step = 3 if kind == "every third" else 1
    pad = 0 if kind == "rows" else 5
    frame = torch.full((n + 2 * pad, k * step + 2 * pad), 7.0, dtype=weight.dtype)
    view = frame[pad : n + pad, pad : k * step + pad : step]
    view.copy_(weight)
    return frame, view


def make(n, k, rank, w_dtype, a_dtype, b_dtype, seed=0):
    g = torch.Generator().manual_seed(seed * 7919 + n * 31 + k * 7 + rank)
    weight = torch.randn(n, k, generator=g).to(w_dtype)
    lora_a = (torch.randn(rank, k, generator=g) / rank**0.5).to(a_dtype)
    lora_b = torch.randn(n, rank, generator=g).to(b_dtype)
    return weight, lora_a, lora_b, torch.tensor(0.73)


def exact(weight, *terms):
    out = weight.double()
    for lora_a, lora_b, scale in terms:
        out = out + float(scale) * (lora_b.double() @ lora_a.double())
    return out


def eager(weight, lora_a, lora_b, scale):
    delta = (lora_b.to(weight.dtype) @ lora_a.to(weight.dtype)) * float(scale)
    return weight + delta


def check(ours, eagers, want):
    """‖ours − f64‖ ≤ ‖eager − f64‖ + one rounding of the result."""
    once = (want.to(ours.dtype).double() - want).norm()
    slack = 1e-7 * want.norm()  # accumulation in float32
    assert (ours.double() - want).norm() <= (eagers.double() - want).norm() + once + slack


@pytest.mark.parametrize(("w_dtype", "a_dtype", "b_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_merge(w_dtype, a_dtype, b_dtype, shape, kind):
    weight, lora_a, lora_b, s = make(*shape, w_dtype, a_dtype, b_dtype)
    _, view = layout(weight, kind)
    for scale, sign in ((s, 1.0), (-s, -1.0)):
        view.copy_(weight)
        OPS.merge_(view, lora_a, lora_b, s, sign)
        check(view, eager(weight, lora_a, lora_b, scale), exact(weight, (lora_a, lora_b, scale)))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 97, 2), (53, 127, 7), (20, 130, 16)], ids=str)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_views(dtype, shape, kind):
    """The same bits in every layout, and not a bit of the surroundings touched."""
    weight, lora_a, lora_b, s = make(*shape, dtype, dtype, dtype)
    plain = weight.clone()
    OPS.merge_(plain, lora_a, lora_b, s, 1.0)
    frame, view = layout(weight, kind)
    untouched = frame.clone()
    OPS.merge_(view, lora_a, lora_b, s, 1.0)
    assert torch.equal(view, plain)
    view.copy_(weight)
    assert torch.equal(frame, untouched)


@pytest.mark.parametrize(("w_dtype", "a_dtype", "b_dtype"), DTYPES)
def test_delta_alone(w_dtype, a_dtype, b_dtype):
    """A zero weight: nothing hides a wrong update. Adapters stored transposed take the same path."""
    weight, lora_a, lora_b, s = make(61, 150, 17, w_dtype, a_dtype, b_dtype)
    weight.zero_()
    ours = weight.clone()
    OPS.merge_(ours, lora_a.T.contiguous().T, lora_b.T.contiguous().T, s, 1.0)
    check(ours, eager(weight, lora_a, lora_b, s), exact(weight, (lora_a, lora_b, s)))


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, BF16), (BF16, BF16, F32), (F16, F16, F32)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_switch(dtypes, shape, kind):
    w_dtype, old_dtype, new_dtype = dtypes
    weight, a0, b0, s0 = make(*shape, w_dtype, old_dtype, old_dtype)
    _, a1, b1, _ = make(*shape[:2], shape[2] + 4, w_dtype, new_dtype, new_dtype, seed=1)
    s1 = torch.tensor(-1.9)
    _, view = layout(weight, kind)
    OPS.switch_(view, a0, b0, s0, a1, b1, s1)
    in_steps = eager(eager(weight, a0, b0, -s0), a1, b1, s1)
    check(view, in_steps, exact(weight, (a0, b0, -s0), (a1, b1, s1)))
    same = weight.clone()
    OPS.switch_(same, a0, b0, s0, a0, b0, s0)
    assert (same.double() - weight.double()).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_same_bits_on_any_thread_count(dtype):
    weight, lora_a, lora_b, s = make(331, 1000, 24, dtype, dtype, dtype)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            merged = weight.clone()
            OPS.merge_(merged, lora_a, lora_b, s, 1.0)
            results.append(merged)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_zero_update_keeps_every_value(dtype):
    """Subnormals and huge values come back as they were."""
    bits = torch.arange(-32768, 32768, dtype=torch.int32)
    if dtype == F32:
        weight = (bits << 16 | (bits & 0xFFFF)).view(F32)
    else:
        weight = bits.to(torch.int16).view(dtype)
    weight = weight[weight.isfinite()].reshape(-1, 2**4)
    merged = weight.clone()
    OPS.merge_(merged, torch.zeros(3, 16, dtype=dtype), torch.ones(len(weight), 3, dtype=dtype), torch.tensor(2.0), 1.0)
    assert torch.equal(merged, weight)


def finite_oracle(weight, lora_a, lora_b, s, sign):
    if not all(t.isfinite().all() for t in (weight, lora_a, lora_b, s)):
        return False
    merged = weight.clone()
    OPS.merge_(merged, lora_a, lora_b, s, sign)
    return bool(merged.isfinite().all())


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_is_finite(dtype, kind):
    weight, lora_a, lora_b, s = make(41, 130, 5, dtype, dtype, dtype)
    top = torch.finfo(dtype).max
    cases = [(weight, lora_a, lora_b, s)]
    for bad in (float("nan"), float("inf"), -float("inf")):
        for which in range(4):
            case = [t.clone() for t in cases[0]]
            case[which].view(-1)[-1] = bad
            cases.append(tuple(case))
    # Near the top: rounding decides, or signs cancel where the bound sees only magnitudes.
    high = weight.clone()
    high[17, 60] = top
    for value in (0.0, 1e-3, -1e-3, 0.01, 1.0):
        lifted_b = lora_b.clone()
        lifted_b[17] = value
        cases.append((high, lora_a, lifted_b, torch.tensor(top / 1000)))
        cases.append((high, lora_a, lifted_b, torch.tensor(-top / 1000)))
    verdicts = set()
    for weight, lora_a, lora_b, s in cases:
        frame, view = layout(weight, kind)
        before = frame.clone()
        for sign in (1.0, -1.0):
            got = bool(OPS.merge_is_finite(view, lora_a, lora_b, s, sign))
            assert got == finite_oracle(weight, lora_a, lora_b, s, sign)
            verdicts.add(got)
        assert torch.equal(frame.nan_to_num(), before.nan_to_num())
    assert verdicts == {True, False}


def test_empty():
    for n, k in ((0, 5), (5, 0)):
        weight = torch.zeros(n, k)
        OPS.merge_(weight, torch.ones(2, k), torch.ones(n, 2), torch.tensor(1.0), 1.0)
        assert bool(OPS.merge_is_finite(weight, torch.ones(2, k), torch.ones(n, 2), torch.tensor(1.0), 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(1, 6).expand(4, 6)}, "weight"),
        ({"weight": torch.zeros(4, 6, 1)}, "weight"),
        ({"weight": torch.zeros(4, 6, dtype=torch.float64)}, "weight"),
        ({"lora_a": torch.zeros(2, 5)}, "lora_a"),
        ({"lora_a": torch.zeros(2, 6, dtype=BF16)}, "lora_a"),
        ({"lora_a": torch.zeros(0, 6), "lora_b": torch.zeros(4, 0)}, "lora_a"),
        ({"lora_b": torch.zeros(4, 3)}, "lora_b"),
        ({"scaling": torch.ones(1)}, "scaling"),
    ],
)
def test_refuses(change, message):
    arguments = {"weight": torch.zeros(4, 6), "lora_a": torch.zeros(2, 6), "lora_b": torch.zeros(4, 2)}
    arguments = {**arguments, "scaling": torch.tensor(1.0), "sign": 1.0, **change}
    with pytest.raises(RuntimeError, match=message):
        OPS.merge_(*arguments.values())


def test_every_instruction_set(isa_environment):
    """Numerical tests of the merge family and of dropout once more, on each instruction set, in another process."""
    if os.environ.get("LORA_KERNELS_CPU_ISA"):
        pytest.skip("already inside such a process")
    chosen = "test_delta_alone or test_switch or test_zero_update or test_bits or (test_is_finite and rows)"
    chosen += " or (test_merge and rows) or (test_views and sliced)"
    files = [__file__, str(Path(__file__).with_name("test_native_dropout.py"))]
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen]
    env = {**isa_environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
