"""The native CPU linear kernels against float64, below the public functions: every path, dtype and odd shape.

The budget: the error of the same sums done by torch in the op's dtype (float32 adapters: in float32), plus one
rounding of the result. LORA_KERNELS_CPU_ISA picks the instruction set at load, so lower ones run in subprocesses.
"""

import itertools
import os
import platform
import subprocess
import sys

import pytest
import torch

import lora_kernels
from lora_kernels import _native

pytestmark = pytest.mark.skipif(not _native.cpu_available, reason="the native CPU library is not built")
ops = torch.ops.lora_kernels
assert lora_kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# M, K, N, R: ones, primes, empty, past every tile edge, rank over K, large enough for the vendor path and threads.
SHAPES = [
    (1, 1, 1, 1), (3, 7, 5, 2), (0, 8, 8, 4), (4, 0, 8, 4), (4, 8, 0, 4), (5, 33, 17, 1), (2, 64, 48, 16),
    (7, 131, 67, 3), (8, 96, 24, 37), (13, 257, 101, 16), (31, 100, 300, 40), (64, 384, 250, 16), (70, 515, 130, 64),
    (129, 40, 65, 512), (150, 72, 9, 5), (6, 1030, 512, 8),
    (33, 700, 130, 140), (90, 515, 49, 129), (20, 3, 999, 2), (301, 259, 97, 37),
    (70, 30000, 64, 3),  # widened, where there are no half-precision units: several blocks of rows and of columns
]  # fmt: skip


def adapter(dtype, *shape, gain=1.0):
    return (torch.randn(*shape) * gain).to(dtype)


def budget(ours, exact, eager, dtype):
    ours, exact, eager = ours.double(), exact.double(), eager.double()
    assert torch.isfinite(ours).all()
    rounding = exact.norm() * torch.finfo(dtype).eps + 1e-30
    error, allowed = (ours - exact).norm(), (eager - exact).norm() + rounding
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def problem(shape, dtype, adapter_dtype, seed=0):
    torch.manual_seed(seed)
    M, K, N, R = shape
    x, w, bias = (torch.randn(*s).to(dtype) for s in ((M, K), (N, K), (N,)))
    a, b = adapter(adapter_dtype, R, K), adapter(adapter_dtype, N, R)
    return x, w * 0.1, bias, a, b, torch.tensor(0.5)


def keep_bits(mask, K):
    bits = (mask[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :K].bool()


def formula(x, w, bias, a, b, scaling, keep, p):
    """Same sums, in the dtype of the arguments; autograd gives the gradients."""
    kept = x if keep is None else torch.where(keep, x, 0) / (1 - p)
    update = torch.nn.functional.linear(torch.nn.functional.linear(kept.to(a.dtype), a).to(b.dtype), b)
    return torch.nn.functional.linear(x, w, bias) + (scaling.to(b.dtype) * update).to(x.dtype)


def check_all(shape, dtype, adapter_dtype, p, invariant):
    x, w, bias, a, b, s = problem(shape, dtype, adapter_dtype)
    seed = torch.tensor(1234567890123) if p else None
    y, h, mask = ops.lora_linear_train(x, w, bias, a, b, s, p, seed, None, invariant)
    keep = keep_bits(mask, x.shape[1]) if p else None
    if not p:
        assert torch.equal(y, ops.lora_linear(x, w, bias, a, b, s, None, invariant))
        out = torch.full((len(x), 2 * len(w) + 1), torch.nan, dtype=dtype)
        ops.lora_linear_out(out[:, : len(w)], x, w, bias, a, b, s, None, invariant)
        # The bits of OpenBLAS, torch's GEMM on other processors, follow the distance of the rows.
        same = torch.equal if platform.machine() == "x86_64" else torch.allclose
        assert same(out[:, : len(w)], y)
        assert out[:, len(w) :].isnan().all()
    torch.manual_seed(1)
    dy = torch.randn_like(y)
    leaves = {}
    for name, as_type in (("exact", lambda t: t.double()), ("eager", lambda t: t.clone())):
        args = [as_type(t).requires_grad_() for t in (x, a, b)]
        z = formula(args[0], as_type(w), as_type(bias), *args[1:], as_type(s), keep, p)
        z.backward(as_type(dy))
        leaves[name] = [z.detach(), *(t.grad for t in args)]
    grads = ops.lora_linear_backward(dy, x, w, a, b, s, h, mask, p, None, True, True, True, invariant)
    for ours, exact, eager in zip([y, *grads], leaves["exact"], leaves["eager"], strict=True):
        assert ours.shape == exact.shape
        assert ours.dtype == eager.dtype
        budget(ours, exact, eager, ours.dtype)
    # The update alone: a big base hides a wrong delta.
    zero = torch.zeros_like(w)
    delta = ops.lora_linear(x, zero, None, a, b, s, None, invariant)
    none = torch.zeros_like(bias)
    budget(delta, formula(x.double(), zero.double(), none.double(), a.double(), b.double(), s, None, 0),
           formula(x, zero, none, a, b, s, None, 0), dtype)  # fmt: skip


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, dtype, p, invariant):
    for adapter_dtype in {dtype, torch.float32}:
        check_all(shape, dtype, adapter_dtype, p, invariant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_onto_strided_rows(dtype):
    for shape, y_dtype in itertools.product(SHAPES, {dtype, torch.float32}):
        x, _, _, a, b, s = problem(shape, dtype, dtype)
        big = torch.randn(len(x), 2 * len(b) + 3).to(y_dtype)
        y = big[:, 1 : 1 + len(b)]
        exact = y.double() + s.double() * (x.double() @ a.double().T) @ b.double().T
        eager = y + (s.to(dtype) * (x @ a.T @ b.T)).to(y_dtype)
        before = big.clone()
        ops.lora_add_(y, x, a, b, s, False)
        budget(y, exact, eager, y_dtype)
        big[:, 1 : 1 + len(b)] = before[:, 1 : 1 + len(b)]
        assert torch.equal(big, before)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_and_input_layouts(dtype, invariant):
    for shape in [(5, 70, 33, 7), (40, 129, 200, 16)]:
        x, w, bias, a, b, s = problem(shape, dtype, dtype)
        exact = formula(*(t.double() for t in (x, w, bias, a, b, s)), None, 0)
        eager = formula(x, w, bias, a, b, s, None, 0)
        by_columns = w.t().contiguous().t()
        neither = torch.stack([w, w], -1)[..., 0]
        wide = torch.stack([x, x], -1)[..., 0]
        spread = [torch.stack([t, t], -1)[..., 0] for t in (a, b)]
        for args in [
            (x, by_columns, bias, a, b),
            (x, neither, bias, a, b),
            (wide, w, None, a, b),
            (x, w, bias, *spread),
        ]:
            y = ops.lora_linear(*args, s, None, invariant)
            off = 0 if args[2] is not None else bias.double()
            budget(y.double() + off, exact, eager, dtype)
        dy = torch.randn(1, shape[2]).to(dtype).expand(shape[0], -1)
        none = torch.empty(0, dtype=torch.uint8)
        h = (x.float() @ a.float().T).contiguous()
        for weight in (w, by_columns, neither):
            dx, _, _ = ops.lora_linear_backward(
                dy, x, weight, a, b, s, h, none, 0.0, None, True, False, False, invariant
            )
            d, e = dy.double(), dy
            budget(dx, d @ w.double() + s.double() * (d @ b.double()) @ a.double(),
                   e @ w + s.to(dtype) * (e @ b) @ a, dtype)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("invariant", [False, True])
def test_slices(dtype, invariant):
    for M, splits in [(3, [5, 0, 40]), (40, [64, 17, 100]), (1, [1, 1])]:
        K, N, R, S = 50, sum(splits), 6, len(splits)
        x, w, bias, _, b, s = problem((M, K, N, R), dtype, dtype)
        a = torch.randn(S, R, K).to(dtype)
        y, h, mask = ops.lora_linear_train(x, w, bias, a, b, s, 0.25, torch.tensor(3), splits, invariant)
        dy = torch.randn_like(y)
        grads = ops.lora_linear_backward(dy, x, w, a, b, s, h, mask, 0.25, splits, True, True, True, invariant)
        keep = keep_bits(mask, K)
        results = {}
        for name, as_type in (("exact", lambda t: t.double()), ("eager", lambda t: t.clone())):
            leaves = [as_type(t).requires_grad_() for t in (x, a, b)]
            columns, weight, shift = [], as_type(w), as_type(bias)
            for i, (start, width) in enumerate(zip([sum(splits[:j]) for j in range(S)], splits, strict=True)):
                part = slice(start, start + width)
                columns.append(
                    formula(leaves[0], weight[part], shift[part], leaves[1][i], leaves[2][part], as_type(s), keep, 0.25)
                )
            z = torch.cat(columns, 1)
            z.backward(as_type(dy))
            results[name] = [z.detach(), *(t.grad for t in leaves)]
        for ours, exact, eager in zip([y, *grads], results["exact"], results["eager"], strict=True):
            budget(ours, exact, eager, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariant_bits(dtype):
    x, w, bias, a, b, s = problem((61, 200, 130, 16), dtype, dtype)
    full = ops.lora_linear(x, w, bias, a, b, s, None, True)
    for rows in ([0], [60], [3, 4], list(range(7, 20)), list(range(1, 41))):
        assert torch.equal(ops.lora_linear(x[rows], w, bias, a, b, s, None, True), full[rows])


@pytest.mark.parametrize("shape", [(96, 512, 300, 16), (20, 4096, 40, 16)], ids=str)  # with fewer columns than threads
@pytest.mark.parametrize(("p", "invariant"), [(0.0, False), (0.1, True)])
def test_thread_count_changes_nothing(shape, p, invariant):
    x, w, bias, a, b, s = problem(shape, torch.bfloat16, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            y, h, mask = ops.lora_linear_train(x, w * 0, bias, a, b, s, p, torch.tensor(5), None, invariant)
            grads = ops.lora_linear_backward(y, x, w, a, b, s, h, mask, p, None, True, True, True, invariant)
            results.append([y, h, mask, *grads])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariant_bits_do_not_follow_the_threads(dtype):
    """Those of torch's own GEMM do, which is the base product of this shape otherwise."""
    x, w, bias, a, b, s = problem((9, 512, 384, 16), dtype, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            y, h, mask = ops.lora_linear_train(x, w, bias, a, b, s, 0.0, None, None, True)
            dx, *_ = ops.lora_linear_backward(y, x, w, a, b, s, h, mask, 0.0, None, True, False, False, True)
            results.append([y, dx])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_dropped_infinities_are_gone():
    x, w, bias, a, b, s = problem((20, 40, 30, 4), torch.float32, torch.float32)
    seed = torch.tensor(11)
    _, h, mask = ops.lora_linear_train(x, w, bias, a, b, s, 0.5, seed, None, False)
    poisoned = torch.where(keep_bits(mask, 40), x, torch.inf)
    _, h2, mask2 = ops.lora_linear_train(poisoned, w, bias, a, b, s, 0.5, seed, None, False)
    assert torch.equal(mask, mask2)
    assert torch.equal(h, h2)


def test_every_instruction_set(isa_environment):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_native_linear as t, torch, itertools\n"
        "shapes = t.SHAPES[::2] + t.SHAPES[11:13]\n"
        "for shape, dtype, p, inv in itertools.product(shapes, t.DTYPES, (0.0, 0.3), (False, True)):\n"
        "    for adapter in {dtype, torch.float32}: t.check_all(shape, dtype, adapter, p, inv)\n"
        "t.test_slices(torch.bfloat16, True); t.test_batch_invariant_bits(torch.float16)\n"
    )
    subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__)], check=True, env=isa_environment)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_rows_are_turned_and_each_has_its_own_bits(dtype):
    """Rows of a panel, of the last panel, and beside more or fewer others; with an adapter and without."""
    x, w, bias, a, b, scaling = problem((63, 301, 130, 20), dtype, dtype)
    whole = ops.lora_linear(x, w, bias, a, b, scaling, None, False)
    without = torch.zeros_like(b)  # of all columns but one: where all of B is zero, torch's GEMM runs
    without[-1, 0] = 1.0
    none = ops.lora_linear(x, w, bias, a, without, scaling, None, False)
    turned = ops._cpu_paths().split()[0] == "last=turned"
    level = ops._cpu_isa()
    if level == 1:  # AVX2; on AVX-512 float32 is turned where torch's own product is slow
        assert turned is (dtype is torch.float32)
    elif dtype is torch.bfloat16:
        assert turned is (level >= 3)
    # On tiles the shrink of few rows has another form.
    for first, last in ((0, 17), (5, 38), (14, 63), (31, 63)) if turned and level < 4 else ():
        part = x[first:last].contiguous()
        assert torch.equal(ops.lora_linear(part, w, bias, a, b, scaling, None, False), whole[first:last])
        plain = ops.lora_linear(part, w, bias, a, without, scaling, None, False)
        assert torch.equal(plain, none[first:last])


def test_few_and_many_rows_are_not_turned_on_avx2():
    if ops._cpu_isa() != 1:
        pytest.skip("the crossovers of AVX2")
    x, w, bias, a, b, scaling = problem((128, 300, 130, 20), torch.float32, torch.float32)
    for rows in (11, 129):
        ops.lora_linear(x.repeat(2, 1)[:rows], w, bias, a, b, scaling, None, False)
        assert "last=turned" not in ops._cpu_paths()
