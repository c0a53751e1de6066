"""lora_linear and lora_add_ against float64: values, gradients, dropout, layouts."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_kernels as lk
from lora_kernels.ops import lora_add_, lora_linear
from lora_kernels.ops.linear.dropout import dropout_mask, unpack_mask
from lora_kernels.testing import assert_within_budget, eager_lora_linear, exact_lora_linear, make_linear

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="f32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float16, id="f16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-f32"),
    pytest.param(torch.float16, torch.float32, id="f16-f32"),
]
# (num_tokens, in_features, out_features, rank)
SHAPES = [
    (1, 1, 1, 1),
    (0, 8, 8, 2),
    (3, 0, 6, 2),
    (3, 8, 0, 2),
    (1, 64, 48, 8),
    (3, 37, 29, 5),
    (8, 128, 96, 16),
    (17, 257, 129, 13),
    (33, 96, 200, 64),
    (130, 131, 67, 100),
    (70, 384, 384, 16),
    (5, 40, 24, 512),
]


def check(case, y, name="y", **kwargs):
    args = case.args()
    assert_within_budget(y, eager_lora_linear(*args, **kwargs), exact_lora_linear(*args, **kwargs), name)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("base", [True, False], ids=["sum", "update-alone"])
def test_forward(backend, dtype, adapter_dtype, shape, base):
    case = make_linear(*shape, dtype, adapter_dtype, base=base)
    before = [tensor.clone() for tensor in case.args() if tensor is not None]
    y = lora_linear(*case.args())
    assert y.dtype == dtype
    check(case, y)
    for tensor, copy in zip([t for t in case.args() if t is not None], before, strict=True):
        assert torch.equal(tensor, copy)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.booleans(),
)
def test_any_shape(num_tokens, in_features, out_features, rank, dtype, wide_adapter, bias):
    adapter_dtype = torch.float32 if wide_adapter else dtype
    case = make_linear(num_tokens, in_features, out_features, rank, dtype, adapter_dtype, bias=bias, seed=num_tokens)
    magnitude = exact_lora_linear(*(t if t is None else t.abs() for t in case.args()))
    exact, eager = exact_lora_linear(*case.args()), eager_lora_linear(*case.args())
    assert_within_budget(lora_linear(*case.args()), eager, exact, magnitude=magnitude)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_deterministic_and_batch_invariant(backend, dtype, adapter_dtype, batch_invariant):
    case = make_linear(40, 200, 72, 12, dtype, adapter_dtype)
    with lk.use_backend(backend, batch_invariant=batch_invariant):
        y = lora_linear(*case.args())
        assert torch.equal(y, lora_linear(*case.args()))
        check(case, y)
        if batch_invariant:
            for rows in (slice(0, 1), slice(3, 10), slice(5, 40)):
                part = lora_linear(case.x[rows], *case.args()[1:])
                assert torch.equal(part, y[rows])


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_batch_invariant_rows_of_training(backend, dtype, adapter_dtype):
    """Its forward has the bits of inference, whatever else is in the batch, and so have the rows of dX."""
    case = make_linear(37, 137, 97, 33, dtype, adapter_dtype)
    case.lora_a.requires_grad_()
    seed = torch.tensor(3)

    def rows(part):
        x = case.x[part].clone().requires_grad_()
        y = lora_linear(x, *case.args()[1:])
        base = torch.ones_like(y)
        return y.detach(), torch.autograd.grad(y, x, base)[0], lora_add_(base, x, *case.args()[3:]).detach()

    with lk.use_backend(backend, batch_invariant=True):
        together = rows(slice(None))
        with torch.no_grad():
            assert torch.equal(together[0], lora_linear(*case.args()))
            assert torch.equal(together[2], lora_add_(torch.ones_like(together[0]), case.x, *case.args()[3:]))
        for row in (0, 17, 36):
            for alone, whole in zip(rows(slice(row, row + 1)), together, strict=True):
                assert torch.equal(alone[0], whole[row])
        dropped = lora_linear(*case.args(), dropout_p=0.5, dropout_seed=seed).detach()
        keep = unpack_mask(dropout_mask(seed, *case.x.shape, 0.5), case.x.shape[1]) * 2
        check(case, dropped, keep=keep)
        first = lora_linear(case.x[:1], *case.args()[1:], dropout_p=0.5, dropout_seed=seed).detach()
        assert torch.equal(first[0], dropped[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend, dtype):
    case = make_linear(24, 64, 48, 8, dtype)
    y = lora_linear(*case.args())
    shaped = lora_linear(case.x.view(2, 3, 4, 64), *case.args()[1:])
    assert shaped.shape == (2, 3, 4, 48)
    assert torch.equal(shaped.view(24, 48), y)
    assert lora_linear(case.x[0], *case.args()[1:]).shape == (48,)
    strided = torch.empty(24, 128, dtype=dtype)[:, ::2].copy_(case.x)
    transposed = case.x.t().contiguous().t()
    sliced_weight = torch.empty(48, 100, dtype=dtype)[:, 7:71].copy_(case.weight)
    turned_weight = case.weight.t().contiguous().t()
    for x in (strided, transposed):
        for weight in (case.weight, sliced_weight, turned_weight):
            check(case, lora_linear(x, weight, *case.args()[2:]))
    turned_a = case.lora_a.t().contiguous().t()
    turned_b = case.lora_b.t().contiguous().t()
    check(case, lora_linear(case.x, case.weight, case.bias, turned_a, turned_b, case.scaling))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_out_splits(backend, dtype, num_tokens):
    splits = [40, 0, 16, 8]
    case = make_linear(num_tokens, 48, 64, 6, dtype, slices=4)
    check(case, lora_linear(*case.args(), out_splits=splits), out_splits=splits)


def test_out(backend):
    case = make_linear(9, 32, 24, 4, torch.bfloat16)
    out = torch.full((3, 3, 24), float("nan"), dtype=torch.bfloat16)
    version = out._version
    assert lora_linear(case.x.view(3, 3, 32), *case.args()[1:], out=out) is out
    assert out._version > version
    check(case, out.view(9, 24))
    wide = torch.full((9, 50), 7.0, dtype=torch.bfloat16)
    lora_linear(*case.args(), out=wide[:, 10:34])
    check(case, wide[:, 10:34])
    assert (wide[:, :10] == 7).all()
    assert (wide[:, 34:] == 7).all()
    turned = torch.zeros(24, 3, 3, dtype=torch.bfloat16).permute(1, 2, 0)
    for odd in (torch.zeros(24, 9, dtype=torch.bfloat16).t(), torch.zeros(9, 48, dtype=torch.bfloat16)[:, ::2], turned):
        x = case.x.view(*odd.shape[:-1], 32)
        assert lora_linear(x, *case.args()[1:], out=odd) is odd
        check(case, odd.reshape(9, 24))


@pytest.mark.parametrize(("in_features", "out_features"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("leading", [(3,), (2, 3), ()], ids=str)
def test_no_features(backend, in_features, out_features, leading):
    case = make_linear(1, in_features, out_features, 2)
    x, shape = torch.ones(*leading, in_features), (*leading, out_features)
    bias = torch.ones(out_features)
    args = (case.weight, bias, case.lora_a.requires_grad_(), case.lora_b, case.scaling)
    expected = F.linear(x, case.weight, bias)
    y = lora_linear(x, *args)
    y.sum().backward()
    with torch.no_grad():
        added = lora_add_(torch.zeros(shape), x, *args[2:])
        plan = lk.ops.plan_batch([-1] * max(1, math.prod(leading)), num_slots=1)
        rows = lk.ops.multi_lora_linear(x, *args[:2], [case.lora_a], [case.lora_b], torch.ones(1), plan)
        (grouped,) = lk.ops.grouped_lora_linear(x, [args[0]], [bias], *([part] for part in args[2:]))
    assert added.shape == y.shape == shape
    if in_features == 0:
        assert torch.equal(y, expected)
        assert torch.equal(rows, expected)
        assert torch.equal(grouped, expected)


def test_scaling_is_read_at_run_time(backend):
    case = make_linear(4, 16, 16, 4)
    y = lora_linear(*case.args()[:5], 0.7)
    assert torch.equal(y, lora_linear(*case.args()))
    case.scaling.fill_(0.0)
    torch.testing.assert_close(lora_linear(*case.args()), F.linear(case.x, case.weight, case.bias))


def gradients(function, case, dtype=None, dy_seed=1):
    """dx, dw, dbias, da, db of a function of the case's tensors."""
    names = ("x", "weight", "bias", "lora_a", "lora_b")
    leaves = {}
    for name in names:
        tensor = getattr(case, name)
        leaves[name] = None if tensor is None else tensor.detach().to(dtype or tensor.dtype).requires_grad_()
    y = function(*leaves.values(), case.scaling)
    generator = torch.Generator().manual_seed(dy_seed)
    y.backward(torch.randn(y.shape, generator=generator).to(case.x.dtype).to(y.dtype))
    return {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("shape", [(1, 64, 48, 8), (33, 37, 29, 5), (130, 96, 72, 16), (20, 384, 384, 100)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients(backend, dtype, adapter_dtype, shape, dropout_p):
    case = make_linear(*shape, dtype, adapter_dtype)
    seed = torch.tensor(1234567890123)
    keep = None
    if dropout_p:
        keep = unpack_mask(dropout_mask(seed, shape[0], shape[1], dropout_p), shape[1]) / (1 - dropout_p)
    ours = gradients(lambda *args: lora_linear(*args, dropout_p=dropout_p, dropout_seed=seed), case)
    eager = gradients(lambda *args: eager_lora_linear(*args, keep=keep), case)
    exact = gradients(lambda *args: exact_lora_linear(*args, keep=keep), case, torch.float64)
    for name, grad in ours.items():
        assert grad.dtype == getattr(case, name).dtype
        assert_within_budget(grad, eager[name], exact[name], f"d{name}")


@pytest.mark.parametrize("needed", ["x", "lora_a", "lora_b", "bias"])
def test_only_what_is_needed(backend, needed):
    case = make_linear(12, 24, 16, 4)
    getattr(case, needed).requires_grad_()
    lora_linear(*case.args()).sum().backward()
    for name in ("x", "weight", "bias", "lora_a", "lora_b"):
        assert (getattr(case, name).grad is not None) == (name == needed)


def test_gradients_of_slices(backend):
    splits = [20, 12]
    case = make_linear(9, 24, 32, 4, slices=2)
    ours = gradients(lambda *args: lora_linear(*args, out_splits=splits), case)
    exact = gradients(lambda *args: exact_lora_linear(*args, out_splits=splits), case, torch.float64)
    for name, grad in ours.items():
        torch.testing.assert_close(grad.double(), exact[name], rtol=1e-5, atol=1e-5)


def test_dropout_follows_the_generator(backend):
    case = make_linear(16, 64, 32, 4)
    case.lora_a.requires_grad_()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(lora_linear(*case.args(), dropout_p=0.5))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    checkpointed = torch.utils.checkpoint.checkpoint(
        lambda x: lora_linear(x, *case.args()[1:], dropout_p=0.5), case.x, use_reentrant=False
    )
    state = torch.random.get_rng_state()
    checkpointed.sum().backward()
    by_checkpoint = case.lora_a.grad.clone()
    assert by_checkpoint.abs().sum() > 0
    torch.random.set_rng_state(state)


def test_checkpoint_recomputes_the_same_mask(backend):
    case = make_linear(16, 64, 32, 4)
    grads = []
    for checkpointed in (False, True):
        a = case.lora_a.clone().requires_grad_()

        def run(x, a=a):
            return lora_linear(x, case.weight, case.bias, a, case.lora_b, case.scaling, dropout_p=0.5)

        torch.manual_seed(5)
        y = torch.utils.checkpoint.checkpoint(run, case.x, use_reentrant=False) if checkpointed else run(case.x)
        y.square().sum().backward()
        grads.append(a.grad)
    assert torch.equal(*grads)


def test_masks_of_the_backends_agree():
    case = make_linear(37, 83, 21, 7)
    seed = torch.tensor(-(2**62) + 12345)
    results = {}
    for name in ("reference", "auto"):
        with lk.use_backend(name):
            results[name] = lora_linear(*case.args(), dropout_p=0.25, dropout_seed=seed)
    torch.testing.assert_close(results["reference"], results["auto"])


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 6, 40])
def test_add(backend, dtype, adapter_dtype, num_tokens):
    case = make_linear(num_tokens, 56, 72, 9, dtype, adapter_dtype, bias=False)
    y = F.linear(case.x, case.weight)
    result = lora_add_(y, case.x, case.lora_a, case.lora_b, case.scaling)
    assert result is y
    exact = exact_lora_linear(*case.args())
    eager = eager_lora_linear(*case.args())
    assert_within_budget(y, eager, exact)
    wide = torch.zeros(num_tokens, 72)
    lora_add_(wide, case.x, case.lora_a, case.lora_b, case.scaling)
    zero = make_linear(num_tokens, 56, 72, 9, dtype, adapter_dtype, bias=False)
    zero.weight.zero_()
    assert_within_budget(wide, eager_lora_linear(*zero.args()), exact_lora_linear(*zero.args()))


def test_add_on_views(backend):
    case = make_linear(12, 20, 16, 4)
    expected = exact_lora_linear(*case.args())
    base = F.linear(case.x, case.weight, case.bias)
    for y in (
        base.clone().view(3, 4, 16),
        torch.empty(12, 40)[:, 5:21].copy_(base).view(3, 4, 16),
        base.t().contiguous().t(),
        torch.empty(3, 9, 16)[:, ::3].copy_(base[:9].view(3, 3, 16)),
    ):
        rows = y.numel() // 16
        x = case.x[:rows].view(*y.shape[:-1], 20)
        assert lora_add_(y, x, *case.args()[3:]) is y
        torch.testing.assert_close(y.reshape(-1, 16).double(), expected[:rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("leading", [(12,), (3, 4)], ids=str)
def test_add_gradients(backend, dropout_p, leading):
    case = make_linear(12, 20, 16, 4)
    seed = torch.tensor(99)
    keep = None
    if dropout_p:
        keep = unpack_mask(dropout_mask(seed, 12, 20, dropout_p), 20) / (1 - dropout_p)

    def ours(x, weight, bias, a, b, scaling):
        y = F.linear(x, weight, bias).view(*leading, 16)
        y = lora_add_(y, x.view(*leading, 20), a, b, scaling, dropout_p=dropout_p, dropout_seed=seed)
        return y.view(12, 16)

    grads = gradients(ours, case)
    exact = gradients(lambda *args: exact_lora_linear(*args, keep=keep), case, torch.float64)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of", [lambda y: y, lambda y: y.view(2, 3, 8)[1]])
def test_adding_to_a_leaf_is_refused_before_it_is_written(backend, of):
    case, leaf = make_linear(3, 8, 8, 2), torch.zeros(6, 8, requires_grad=True)
    y = of(leaf)
    with pytest.raises(ValueError, match="y: a leaf that requires grad, or a view of one"):
        lora_add_(y, case.x if len(y) == 3 else torch.cat([case.x] * 2), *case.args()[3:])
    assert (leaf == 0).all()
    with torch.no_grad():
        assert lora_add_(y, case.x if len(y) == 3 else torch.cat([case.x] * 2), *case.args()[3:]) is y


def test_second_derivative_is_refused(backend):
    case = make_linear(3, 8, 8, 2)
    case.x.requires_grad_()
    y = lora_linear(*case.args()).square().sum()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(y, case.x, create_graph=True)


def test_forward_mode_is_refused(backend):
    case = make_linear(3, 8, 8, 2)
    plan = lk.ops.plan_batch([0, -1, 0], num_slots=1)
    args = case.args()[1:]
    weight, bias, a, b, scaling = args
    calls = {
        "lora_linear": lambda x: lora_linear(x, *args),
        "multi_lora_linear": lambda x: lk.ops.multi_lora_linear(x, weight, bias, [a], [b], torch.ones(1), plan),
        "grouped_lora_linear": lambda x: lk.ops.grouped_lora_linear(x, [weight], [bias], [a], [b], [scaling])[0],
        "lora_add_": lambda x: lora_add_(torch.zeros_like(x), x, a, b, scaling),
    }
    for call in calls.values():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(case.x, torch.ones_like(case.x))
            with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
                call(dual)
        with pytest.raises(RuntimeError):
            torch.func.jvp(call, (case.x,), (case.x,))


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.functionalize, torch.func.jacrev])
def test_function_transforms_are_refused_by_name(backend, transform):
    x, weight, bias, a, b, s = make_linear(3, 8, 8, 2).args()
    out = torch.empty(3, 8)
    calls = [
        (lambda x: lora_add_(F.linear(x, weight), x, a, b, s), "y", x),
        (lambda x: lora_linear(x, weight, bias, a, b, s, out=out), "out", x),
        (lambda w: lk.ops.merge_(w, a, b, s), "weight", weight),
    ]
    for call, name, value in calls:
        with pytest.raises(RuntimeError, match=f"{name}: written in place, which the transforms of torch.func"):
            transform(call)(value[None] if transform is torch.vmap else value)


def test_nan_in_unwritten_memory_never_shows(backend, monkeypatch):
    """Every output element is written: fresh memory is NaN here."""
    for shape in [(5, 33, 17, 3), (0, 8, 8, 2), (64, 130, 70, 9)]:
        case = make_linear(*shape, torch.bfloat16)
        out = torch.full((shape[0], shape[2]), float("nan"), dtype=torch.bfloat16)
        lora_linear(*case.args(), out=out)
        check(case, out)
