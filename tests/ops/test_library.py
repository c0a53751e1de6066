"""The op boundary: opcheck, torch.compile, torch.export, autocast, inference mode, backends."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

import lora_kernels as lk
from lora_kernels import _native
from lora_kernels.ops import (
    dispatch,
    grouped_lora_linear,
    library,
    lora_add_,
    lora_linear,
    merge_,
    multi_lora_linear,
    plan_batch,
)
from lora_kernels.testing import make_linear, make_multi


def _samples():
    """One call of every op, with raw inputs and no gradients."""
    case = make_linear(6, 24, 16, 4, torch.bfloat16, torch.float32)
    sliced = make_linear(6, 24, 16, 4, slices=2)
    multi = make_multi(6, 24, 16, 4, 3)
    plan = plan_batch(multi.token_slots, multi.slot_ranks)
    rows = (plan.row_order, plan.segment_starts)
    x, weight, _, a, b, s = case.args()
    seed = torch.tensor(7)
    y, h, mask = library.op("lora_linear_train")(*case.args(), 0.25, seed, None, False)
    base = (multi.x, multi.weight, multi.bias)
    lists = ([*multi.a_bank.unbind()], [*multi.b_bank.unbind()])
    grads = [[torch.zeros_like(t) for t in group] for group in lists]
    half_embedding = (torch.randn(4, 16, dtype=torch.bfloat16), torch.randn(24, 4, dtype=torch.bfloat16))
    half_adapter = (a.to(torch.bfloat16), b.to(torch.bfloat16), torch.tensor(2.0))
    merged = weight.clone()
    body, _ = library.op("merge_exact_")(merged, a, b, s)
    shrunk = library.op("lora_shrink")(multi.x, multi.a_bank, plan.slot_ranks, *rows, False)
    return {
        "lora_linear": [(*case.args(), None, False), (*sliced.args(), [10, 6], True)],
        "lora_linear_out": [(torch.empty_like(y), *case.args(), None, False)],
        "lora_linear_train": [(*case.args(), 0.25, seed, None, False), (*case.args(), 0.0, None, None, False)],
        "lora_linear_backward": [
            (y, x, weight, a, b, s, h, mask, 0.25, None, True, True, True, False),
            (y, x, None, a, b, s, h, mask, 0.25, None, False, True, False, False),
        ],
        "lora_add_": [(y.clone(), x, a, b, s, False)],
        "lora_add_train_": [(y.clone(), x, a, b, s, 0.25, seed, False)],
        "multi_lora_linear": [
            (*base, multi.a_bank, multi.b_bank, multi.slot_scalings, plan.slot_ranks, *rows, None, False)
        ],
        "multi_lora_linear_list": [(*base, *lists, multi.slot_scalings, *rows, None, False)],
        "multi_lora_backward": [
            (torch.randn(6, 16), *base[:2], *lists, multi.slot_scalings, *rows, None, *grads, True),
        ],
        "grouped_lora_linear": [
            (x, [weight, weight], [], [a, a], [b, b], [s, s], [torch.empty_like(y) for _ in range(2)], True, False)
        ],
        "grouped_lora_backward": [
            (
                x,
                [y, y],
                [weight, weight],
                [a, a],
                [b, b],
                [s, s],
                torch.cat([h, h], 1),
                [a.clone(), a.clone()],
                [b.clone(), b.clone()],
                True,
                False,
            )
        ],
        "lora_shrink": [(multi.x, multi.a_bank, plan.slot_ranks, *rows, False)],
        "lora_expand_": [
            (torch.randn(6, 16), shrunk, multi.b_bank, multi.slot_scalings, plan.slot_ranks, *rows, None, False)
        ],
        "merge_": [(weight.clone(), a, b, s, -1.0)],
        "merge_list_": [([weight.clone(), weight.clone()], [a, a], [b, b], [s, s], 1.0)],
        "merge_is_finite": [(weight, a, b, s, 1.0)],
        "switch_": [(weight.clone(), a, b, s, a, b, s)],
        "row_norm": [(weight, a, b, s)],
        "lora_embedding": [(torch.tensor([3, 0, 3]), weight, *half_embedding, s, False)],
        "lora_embedding_backward": [
            (torch.randn(3, 24, dtype=torch.bfloat16), torch.tensor([3, 0, 3]), *half_embedding, s, 0, True, True),
            (torch.randn(3, 24, dtype=torch.bfloat16), torch.tensor([3, 0, 3]), *half_embedding, s, -1, False, True),
        ],
        "merge_exact_": [(weight.clone(), a, b, s)],
        "unmerge_exact_": [(merged.clone(), a, b, s, body)],
        "switch_exact_": [(merged.clone(), a, b, s, *half_adapter, body)],
        "dropout_mask": [(seed, 5, 20, 0.25)],
    }


def test_every_op_is_sampled():
    assert set(_samples()) == set(library.SCHEMAS) == set(dispatch.REFERENCE)


@pytest.mark.parametrize("name", sorted(library.SCHEMAS))
def test_opcheck(name):
    for args in _samples()[name]:
        torch.library.opcheck(library.op(name), args)


@pytest.mark.parametrize("name", sorted(set(library.SCHEMAS) - {"merge_exact_", "unmerge_exact_", "switch_exact_"}))
def test_opcheck_of_the_references_in_float64(name):
    for args in _samples()[name]:
        args = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
        torch.library.opcheck(library.reference_op(name), args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_gradients(dynamic):
    def step(x, weight, bias, a, b, s):
        return torch.relu(lora_linear(x, weight, bias, a, b, s, dropout_p=0.0)) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (5, 9, 17):
        case = make_linear(num_tokens, 24, 16, 4)
        results = []
        for function in (step, compiled):
            leaves = [t.detach().clone().requires_grad_() for t in case.args()[:5]]
            y = function(*leaves, case.scaling)
            y.sum().backward()
            results.append((y, *(leaf.grad for leaf in leaves)))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(eager, traced)


def test_compile_inference_with_inductor():
    case = make_linear(6, 24, 16, 4)
    multi = make_multi(6, 24, 16, 4, 3)
    plan = plan_batch(multi.token_slots, multi.slot_ranks)

    def run(x, scaling, slots_x):
        y = lora_linear(x, *case.args()[1:5], scaling)
        y = lora_add_(y, x, case.lora_a, case.lora_b, scaling)
        z = multi_lora_linear(slots_x, multi.weight, multi.bias, multi.a_bank, multi.b_bank, multi.slot_scalings, plan)
        return torch.relu(y) + z

    compiled = torch.compile(run, fullgraph=True)
    with torch.no_grad():
        for value in (0.7, 1.3):
            scaling = torch.tensor(value)
            torch.testing.assert_close(compiled(case.x, scaling, multi.x), run(case.x, scaling, multi.x))


def test_scaling_tensor_does_not_recompile():
    case = make_linear(6, 24, 16, 4)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda s: lora_linear(*case.args()[:5], s), backend=counter, fullgraph=True)
    for value in (0.1, 0.2, 0.3):
        compiled(torch.tensor(value))
    assert counter.frame_count == 1


def test_compiled_dropout_follows_the_seed():
    case = make_linear(6, 64, 16, 4)
    seed = torch.tensor(3)
    compiled = torch.compile(
        lambda x: lora_linear(x, *case.args()[1:], dropout_p=0.5, dropout_seed=seed),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(compiled(case.x), lora_linear(*case.args(), dropout_p=0.5, dropout_seed=seed))


def test_compile_merge():
    case = make_linear(1, 24, 16, 4)
    weight = case.weight.clone()

    def run(weight):
        merge_(weight, case.lora_a, case.lora_b, case.scaling)
        return weight * 2

    doubled = torch.compile(run, fullgraph=True, backend="aot_eager")(weight)
    expected = merge_(case.weight.clone(), case.lora_a, case.lora_b, case.scaling)
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(doubled, expected * 2)


class _Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        case = make_linear(1, 24, 16, 4)
        for name in ("weight", "bias", "lora_a", "lora_b"):
            setattr(self, name, torch.nn.Parameter(getattr(case, name)))
        self.register_buffer("scaling", case.scaling)

    def forward(self, x):
        return lora_linear(x, self.weight, self.bias, self.lora_a, self.lora_b, self.scaling)


def test_export():
    layer, x = _Layer(), torch.randn(2, 5, 24)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=({1: tokens},))
        assert any("lora_linear" in str(node.target) for node in program.graph.nodes)
        other = torch.randn(2, 11, 24)
        torch.testing.assert_close(program.module()(other), layer(other))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_autocast(backend, adapter_dtype):
    case = make_linear(7, 24, 16, 4)
    case.lora_a, case.lora_b = case.lora_a.to(adapter_dtype), case.lora_b.to(adapter_dtype)
    for name in ("x", "weight", "lora_a"):
        getattr(case, name).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(*case.args())
    assert y.dtype == torch.bfloat16
    half = make_linear(7, 24, 16, 4, torch.bfloat16, adapter_dtype)
    torch.testing.assert_close(y, lora_linear(*half.args()), rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert case.weight.grad.dtype == torch.float32
    assert case.x.grad.dtype == torch.float32
    assert case.lora_a.grad.dtype == adapter_dtype


@pytest.mark.parametrize("form", ["bank", "list", "grouped"])
def test_autocast_to_another_half_precision_than_that_of_the_adapters(form, backend):
    x, weight, bias, a, b, s = make_linear(6, 24, 16, 4, torch.float16).args()
    plan, leaves = plan_batch([0, -1, 0] * 2, num_slots=1), [t.requires_grad_() for t in (x, a, b)]
    with torch.autocast("cpu", torch.bfloat16):
        if form == "grouped":
            (y,) = grouped_lora_linear(x, [weight], [bias], [a], [b], [s])
        else:
            banks = ([a], [b]) if form == "list" else (a[None], b[None])
            y = multi_lora_linear(x, weight, bias, *banks, s[None], plan)
        expected = lora_linear(x, weight, bias, a, b, s)
    assert y.dtype == torch.bfloat16
    rows = slice(None) if form == "grouped" else slice(0, None, 3)
    found = [torch.autograd.grad(t[rows].float().square().sum(), leaves) for t in (y, expected)]
    for ours, wanted in zip((y[rows], *found[0]), (expected[rows], *found[1]), strict=True):
        assert ours.dtype == wanted.dtype
        torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=2e-2)


def test_inference_mode(backend):
    case = make_linear(7, 24, 16, 4)
    with torch.inference_mode():
        y = lora_linear(*case.args())
        assert y.is_inference()
        lora_add_(y, case.x, case.lora_a, case.lora_b, 0.5)
        case.lora_a.requires_grad_()
        assert not lora_linear(*case.args()).requires_grad


def test_meta_tensors():
    case = make_linear(7, 24, 16, 4, device="meta")
    assert lora_linear(*case.args()).shape == (7, 16)


def test_a_named_backend_never_falls_back():
    case = make_linear(2, 8, 8, 2)
    for name in ("triton", "cuda"):
        if dispatch.unavailable(name) is None:
            continue
        with pytest.raises(RuntimeError, match=f"use_backend: backend '{name}' can not run here"), lk.use_backend(name):
            lora_linear(*case.args())
    with pytest.raises(ValueError, match="expected one of auto, reference"), lk.use_backend("gpu"):
        pass
    assert dispatch.forced is None


def test_use_backend_nests_and_restores():
    with lk.use_backend("reference", batch_invariant=True):
        with lk.use_backend("auto"):
            assert dispatch.forced is None
            assert dispatch.batch_invariant
        assert dispatch.forced == "reference"
        with pytest.raises(ZeroDivisionError), lk.use_backend("auto", batch_invariant=False):
            1 / 0  # noqa: B018
        assert dispatch.batch_invariant
    assert dispatch.forced is None
    assert not dispatch.batch_invariant


def test_explain_says_what_ran():
    case = make_linear(2, 8, 8, 2)
    with lk.use_backend("reference"):
        lora_linear(*case.args())
        report = lk.explain()
    assert "backend setting: reference" in report
    assert "reference ran: " in report
    assert "lora_linear " in report
    for name in ("triton", "cuda"):
        assert f"{name}: can" in report
    if dispatch.unavailable("cpu") is None:
        lora_linear(*case.args())
        assert "(the last one)" in lk.explain()


def test_the_environments_words(monkeypatch):
    name = "LORA_KERNELS_BATCH_INVARIANT"
    for value, expected in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv(name, value)
        assert dispatch._switch(name) is expected
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match=f"{name}: expected 0 or 1, got 'true'"):
        dispatch._switch(name)


def test_a_level_of_cpu_kernels_that_there_is_not(monkeypatch):
    monkeypatch.setattr(_native, "_loaded", False)
    monkeypatch.setenv("LORA_KERNELS_CPU_ISA", "avx-512")
    with pytest.raises(ValueError, match=r"LORA_KERNELS_CPU_ISA: expected one of portable, .*, got 'avx-512'"):
        _native.load()
