"""``grouped_lora_linear``: against float64 and against one call a projection, gradients, odd shapes, bad input."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops import grouped_lora_linear, lora_linear
from lora_kernels.testing import DTYPES, assert_within_budget, eager_lora_linear, exact_lora_linear, make_grouped

# M, K, widths, ranks
SHAPES = (
    (1, 64, (48, 16, 16), (8, 8, 8)),
    (23, 37, (29, 1, 40), (5, 16, 1)),
    (70, 130, (67, 129), (33, 2)),
    (6, 16, (8,), (3,)),
)


def _results(function, case, dtype=None):
    """{name: y or gradient} of ``function(x, weights, biases, lora_a, lora_b)``."""
    cast = [[None if t is None else t.detach().to(dtype or t.dtype) for t in group] for group in case.groups()]
    for tensors in (cast[0], cast[3], cast[4]):
        for tensor in tensors:
            tensor.requires_grad_()
    y = function(cast[0][0], *cast[1:])
    generator = torch.Generator().manual_seed(1)
    dy = [torch.randn(part.shape, generator=generator).to(case.x.dtype).to(part.device, part.dtype) for part in y]
    leaves = [*cast[0], *cast[3], *cast[4]]
    grads = torch.autograd.grad(y, leaves, dy)
    return {f"y{i}": part.detach() for i, part in enumerate(y)} | {f"grad {i}": grad for i, grad in enumerate(grads)}


def _apart(one, case):
    def run(x, *groups):
        return [one(x, *each, scaling) for *each, scaling in zip(*groups, case.scalings, strict=True)]

    return run


def check(case):
    """y and all gradients within the budget of eager's, which rounds the gradient of x for each projection."""
    ours = _results(lambda *args: grouped_lora_linear(*args, case.scalings), case)
    eager = _results(_apart(eager_lora_linear, case), case)
    exact = _results(_apart(exact_lora_linear, case), case, torch.float64)
    for name, result in ours.items():
        assert_within_budget(result, eager[name], exact[name], name)
    return ours


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_are_within_budget(shape, dtypes, backend):
    for base in (True, False):  # a big base would hide a wrong update
        check(make_grouped(*shape, *DTYPES[dtypes], base=base))


def test_without_gradients_the_same_bits(backend):
    case = make_grouped(19, 40, (24, 8, 8), (4, 4, 2), torch.bfloat16)
    with torch.no_grad():
        plain = grouped_lora_linear(*case.args())
    with_grad = _results(lambda *args: grouped_lora_linear(*args, case.scalings), case)
    for i, part in enumerate(plain):
        assert torch.equal(part, with_grad[f"y{i}"])


def test_only_what_is_asked_for(backend):
    case = make_grouped(9, 24, (16, 8), (4, 2))
    full = _results(lambda *args: grouped_lora_linear(*args, case.scalings), case)
    for wanted in ([case.x], [case.lora_a[1]], [case.lora_b[0]]):
        for tensor in (case.x, *case.lora_a, *case.lora_b):
            tensor.requires_grad_(any(tensor is one for one in wanted))
        y = grouped_lora_linear(*case.args())
        generator = torch.Generator().manual_seed(1)
        grads = torch.autograd.grad(y, wanted, [torch.randn(part.shape, generator=generator) for part in y])
        place = [case.x, *case.lora_a, *case.lora_b]
        at = next(i for i, tensor in enumerate(place) if tensor is wanted[0])
        torch.testing.assert_close(grads[0], full[f"grad {at}"])


def test_gradients_of_weights_and_biases(backend):
    case = make_grouped(9, 24, (16, 8), (4, 2))
    leaves = [t.requires_grad_() for t in (*case.weights, *case.biases)]
    grouped = torch.autograd.grad(sum(part.square().sum() for part in grouped_lora_linear(*case.args())), leaves)
    each = zip(*case.groups()[1:], case.scalings, strict=True)
    apart = torch.autograd.grad(sum(lora_linear(case.x, *args).square().sum() for args in each), leaves)
    for ours, expected in zip(grouped, apart, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_rows_and_leading_dimensions(tokens, backend):
    case = make_grouped(tokens * 3, 24, (16, 8), (4, 2))
    x = case.x.view(tokens, 3, 24)
    y = grouped_lora_linear(x, *case.groups()[1:], case.scalings)
    assert [tuple(part.shape) for part in y] == [(tokens, 3, 16), (tokens, 3, 8)]
    for part, flat in zip(y, grouped_lora_linear(*case.args()), strict=True):
        assert torch.equal(part.flatten(0, 1), flat)


def test_strided_inputs(backend):
    case = make_grouped(12, 24, (16, 8), (4, 2), torch.bfloat16)
    expected = grouped_lora_linear(*case.args())
    case.x = case.x.repeat_interleave(2, 1)[:, ::2]
    case.weights = [w.t().contiguous().t() for w in case.weights]
    case.lora_a = [a.t().contiguous().t() for a in case.lora_a]
    for ours, part in zip(grouped_lora_linear(*case.args()), expected, strict=True):
        torch.testing.assert_close(ours, part, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_same_in_any_batch(backend, dtype):
    case = make_grouped(40, 73, (25, 16), (4, 20), dtype)

    def results(rows):
        x = case.x[rows].clone().requires_grad_()
        y = grouped_lora_linear(x, *case.groups()[1:], case.scalings)
        return *(part.detach() for part in y), torch.autograd.grad(sum(part.sum() for part in y), x)[0]

    with lk.use_backend(lk.ops.dispatch.forced, batch_invariant=True):
        whole = results(slice(None))
        with torch.no_grad():
            assert all(map(torch.equal, whole, grouped_lora_linear(*case.args())))
        for rows in (slice(0, 1), slice(7, 33)):
            assert all(torch.equal(a, b[rows]) for a, b in zip(results(rows), whole, strict=True))


def test_compiles_as_one_graph():
    case = make_grouped(9, 24, (16, 8), (4, 2))
    leaves = [t.requires_grad_() for t in (case.x, *case.lora_a, *case.lora_b)]

    def step():
        return sum(part.square().sum() for part in grouped_lora_linear(*case.args()))

    eager = torch.autograd.grad(step(), leaves)
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(), leaves)
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected)


def test_double_backward_is_refused():
    case = make_grouped(3, 8, (4, 4), (2, 2))
    case.x.requires_grad_()
    y = grouped_lora_linear(*case.args())
    with pytest.raises(RuntimeError, match="grouped_lora_linear: double backward"):
        torch.autograd.grad(y[0].sum() + y[1].sum(), case.x, create_graph=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weights", torch.zeros(8, 24), "weights: expected a list of at least one tensor, got Tensor"),
        ("weights", [], "weights: expected a list"),
        ("lora_a", [torch.zeros(4, 24)], "lora_a: expected 2 entries, one a projection, got 1"),
        ("scalings", 1.0, "scalings: expected 2 entries, one a projection, got float"),
        ("lora_b", [torch.zeros(16, 4), torch.zeros(8, 3)], r"projection 1: lora_b: expected shape"),
        ("lora_a", [torch.zeros(4, 24), torch.zeros(2, 23)], "projection 1: lora_a: expected"),
        ("biases", [torch.zeros(16), torch.zeros(7)], "projection 1: bias: expected shape"),
        ("scalings", [1.0, torch.zeros(2)], r"scalings\[1\]: expected a float or a 0-d"),
    ],
)
def test_bad_arguments_are_named(name, value, message):
    case = make_grouped(3, 24, (16, 8), (4, 2))
    setattr(case, name, value)
    with pytest.raises((TypeError, ValueError), match=message):
        grouped_lora_linear(*case.args())


def test_factors_of_two_dtypes_are_refused():
    case = make_grouped(3, 24, (16, 8), (4, 2), torch.bfloat16)
    case.lora_a[1] = case.lora_a[1].float()
    with pytest.raises(TypeError, match=r"projection 1: lora_a: expected torch.bfloat16, the dtype of the first"):
        grouped_lora_linear(*case.args())
