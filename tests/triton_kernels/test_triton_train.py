"""Training on Triton against float64: gradients of the public functions, dropout's mask, one and several adapters."""

import pytest
import torch
import torch.utils.checkpoint

import lora_kernels as lk
from lora_kernels.ops.linear import dropout, reference, train_config
from lora_kernels.ops.multi import reference as multi_reference
from lora_kernels.testing import DTYPES, assert_within_budget, eager_lora_linear, exact_lora_linear, make_linear

triton_train = pytest.importorskip("lora_kernels.ops.linear.triton_train")
triton_gradients = pytest.importorskip("lora_kernels.ops.linear.triton_gradients")
multi_train = pytest.importorskip("lora_kernels.ops.multi.triton_train")

SEED = 2**62 - 12345


def _gradients(function, case, dtype=None):
    """y, dx, da, db of a function of the case's tensors, with dy from a fixed seed."""
    leaves = {n: getattr(case, n).detach().to(dtype or getattr(case, n).dtype) for n in ("x", "lora_a", "lora_b")}
    x, lora_a, lora_b = (leaf.requires_grad_() for leaf in leaves.values())
    weight, bias = (t if t is None else t.to(dtype or t.dtype) for t in (case.weight, case.bias))
    y = function(x, weight, bias, lora_a, lora_b, case.scaling)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(dy.to(y.device, case.x.dtype).to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def _check(case, p=0.0, splits=None):
    seed = torch.tensor(SEED, device=case.x.device)
    keep = dropout.unpack_mask(dropout.dropout_mask(seed, *case.x.shape, p), case.x.shape[1]) / (1 - p) if p else None
    ours = _gradients(lambda *args: lk.ops.lora_linear(*args, dropout_p=p, dropout_seed=seed, out_splits=splits), case)
    same = {"out_splits": splits, "keep": keep}
    eager = _gradients(lambda *args: eager_lora_linear(*args, **same), case)
    exact = _gradients(lambda *args: exact_lora_linear(*args, **same), case, torch.float64)
    for name, result in ours.items():
        assert_within_budget(result, eager[name], exact[name], f"{name}, dropout {p}, slices {splits}")
    return ours


@pytest.mark.parametrize("dtypes", DTYPES)
def test_gradients_are_within_budget(dtypes, device):
    """Sums with the base, and the update alone: a big base would hide a wrong one."""
    for shape, p, base in (((1, 64, 48, 8), 0.3, True), ((18, 37, 29, 5), 0.0, True), ((18, 37, 29, 5), 0.3, False)):
        _check(make_linear(*shape, *DTYPES[dtypes], base=base, device=device), p)


@pytest.mark.parametrize(
    ("shape", "p"), [((50, 72, 40, 16), 0.0), ((50, 72, 40, 16), 0.3), ((34, 70, 37, 70), 0.0)], ids=str
)
def test_gradients_of_several_tiles(shape, p, device):
    """TMA descriptors, ranks of more than one block, more strips and splits than one."""
    _check(make_linear(*shape, torch.float16, device=device), p)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_slices(p, device):
    splits = [40, 0, 17, 7]
    _check(make_linear(19, 48, 64, 6, torch.float16, slices=4, device=device), p, splits)


@pytest.mark.parametrize("rank", [1, 512])
def test_ranks(rank, device):
    _check(make_linear(9, 24, 20, rank, torch.float16, base=False, device=device))


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 8, 8), (37, 83, 9), (3, 1000, 2), (0, 8, 1), (4, 0, 1)], ids=str)
def test_the_mask_is_that_of_the_reference_bit_for_bit(shape, device):
    for seed in (0, 1, -1, SEED, -(2**62) + 7):
        for p in (0.001, 0.1, 0.5, 0.999):
            at = torch.tensor(seed, device=device)
            assert torch.equal(triton_train.dropout_mask(at, *shape[:2], p), dropout.dropout_mask(at, *shape[:2], p))


def test_all_backends_train_alike(device):
    """The same seed gives the same mask, and so y and gradients that differ by rounding only."""
    case = make_linear(37, 83, 21, 7, device=device)
    seed = torch.tensor(SEED, device=device)
    found = []
    for backend in ("triton", "reference", "auto"):
        with lk.use_backend(backend):
            found.append(_gradients(lambda *args: lk.ops.lora_linear(*args, dropout_p=0.25, dropout_seed=seed), case))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(value, other[name])


def test_checkpoint_recomputes_the_same_mask(device):
    case = make_linear(12, 40, 24, 4, device=device)
    grads = []
    for checkpointed in (False, True):
        a = case.lora_a.clone().requires_grad_()

        def run(x, a=a):
            return lk.ops.lora_linear(x, case.weight, case.bias, a, case.lora_b, case.scaling, dropout_p=0.5)

        torch.manual_seed(5)
        y = torch.utils.checkpoint.checkpoint(run, case.x, use_reentrant=False) if checkpointed else run(case.x)
        y.square().sum().backward()
        grads.append(a.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
def test_add_gradients(p, dtypes, device):
    case = make_linear(19, 40, 24, 6, *DTYPES[dtypes], device=device, bias=False)
    seed = torch.tensor(SEED, device=device)
    keep = dropout.unpack_mask(dropout.dropout_mask(seed, *case.x.shape, p), 40) / (1 - p) if p else None

    def ours(x, weight, bias, *adapters):
        y = torch.zeros(19, 24, dtype=x.dtype, device=device)
        return lk.ops.lora_add_(y, x, *adapters, dropout_p=p, dropout_seed=seed)

    def update(function):
        return lambda x, weight, *rest: function(x, torch.zeros_like(weight), *rest, keep=keep)

    found = _gradients(ours, case)
    eager, exact = (
        _gradients(update(eager_lora_linear), case),
        _gradients(update(exact_lora_linear), case, torch.float64),
    )
    for name, value in found.items():
        assert_within_budget(value, eager[name], exact[name], name)


@pytest.mark.parametrize("needed", ["x", "lora_a", "lora_b"])
def test_only_what_is_needed(needed, device):
    case = make_linear(12, 24, 16, 4, device=device)
    every = _gradients(lk.ops.lora_linear, case)
    leaf = getattr(case, needed).requires_grad_()
    lk.ops.lora_linear(*case.args()).backward(
        torch.randn(12, 16, generator=torch.Generator().manual_seed(1)).to(device)
    )
    assert torch.equal(leaf.grad, every[f"d{needed}"])
    for name in {"x", "lora_a", "lora_b"} - {needed}:
        assert getattr(case, name).grad is None


@pytest.mark.parametrize(("tokens", "features", "outputs"), [(0, 8, 8), (3, 0, 8), (3, 8, 0)])
def test_empty(tokens, features, outputs, device):
    case = make_linear(tokens, features, outputs, 4, device=device)
    found = _gradients(lk.ops.lora_linear, case)
    for name in ("x", "lora_a", "lora_b"):
        assert not found[f"d{name}"].any(), name


def test_strides(device):
    """Columns of a wider x, a weight and adapters stored by columns."""
    case = make_linear(20, 48, 40, 8, torch.float16, device=device)
    expected = _gradients(lk.ops.lora_linear, case)
    wide = torch.full((20, 97), torch.nan, dtype=torch.float16, device=device)
    wide[:, 1::2] = case.x
    turned = [t.t().contiguous().t() for t in (case.weight, case.lora_a, case.lora_b)]
    a, b = turned[1].requires_grad_(), turned[2].requires_grad_()
    x = wide[:, 1::2].requires_grad_()
    dy = torch.randn(20, 40, generator=torch.Generator().manual_seed(1)).to(device, torch.float16)
    grads = torch.autograd.grad(lk.ops.lora_linear(x, turned[0], case.bias, a, b, case.scaling), (x, a, b), dy)
    for grad, name in zip(grads, ("dx", "dlora_a", "dlora_b"), strict=True):
        torch.testing.assert_close(grad, expected[name])


def test_the_same_call_gives_the_same_bits(device):
    case = make_linear(40, 40, 24, 8, torch.float16, device=device)
    first = _gradients(lk.ops.lora_linear, case)
    for name, value in _gradients(lk.ops.lora_linear, case).items():
        assert torch.equal(value, first[name]), name


def test_batch_invariant_rows_of_dx(device):
    case = make_linear(35, 48, 40, 8, torch.float16, device=device)
    dy = torch.randn(35, 40, generator=torch.Generator().manual_seed(1)).to(device, torch.float16)

    def dx_of(rows):
        x = case.x[rows].clone().requires_grad_()
        y = lk.ops.lora_linear(x, *case.args()[1:])
        return torch.autograd.grad(y, x, dy[rows])[0], y

    with lk.use_backend("triton", batch_invariant=True):
        whole = dx_of(slice(0, 35))
        for rows in (slice(0, 1), slice(7, 9), slice(20, 35)):
            assert all(torch.equal(part, all_rows[rows]) for part, all_rows in zip(dx_of(rows), whole, strict=True))


def test_an_infinite_row_of_x_spoils_only_what_it_must(device):
    case = make_linear(20, 40, 24, 4, torch.float16, device=device)
    expected = _gradients(lk.ops.lora_linear, case)
    case.x[4] = torch.inf
    found = _gradients(lk.ops.lora_linear, case)
    assert torch.equal(found["dx"], expected["dx"])
    others = torch.arange(20) != 4
    assert torch.equal(found["y"][others], expected["y"][others])


def _several(ranks, dtype, adapter_dtype=None, splits=None, tokens=20, features=40, outputs=48, device="cpu"):
    """Arguments of multi_lora_backward but for da and db, with one slot that no row uses, and the slot of each row."""
    slices = splits and len(splits)
    cases = [
        make_linear(tokens, features, outputs, rank, dtype, adapter_dtype, slices=slices, seed=slot, device=device)
        for slot, rank in enumerate(ranks)
    ]
    generator = torch.Generator().manual_seed(3)
    slots = torch.randint(-1, max(1, len(ranks) - 1), (tokens,), generator=generator).to(device)
    plan = lk.ops.plan_batch(slots, num_slots=len(ranks))
    dy = torch.randn(tokens, outputs, generator=generator).to(device, dtype)
    scalings = torch.linspace(0.5, 2.0, len(ranks), device=device)
    adapters = [case.lora_a for case in cases], [case.lora_b for case in cases]
    rows = plan.row_order, plan.segment_starts
    return [dy, cases[0].x, cases[0].weight, *adapters, scalings, *rows, splits], slots


def _backward(function, arguments, need_x=True):
    """dx, *da, *db; the gradients start as NaN."""
    grads = [[torch.full_like(t, torch.nan) for t in tensors] for tensors in arguments[3:5]]
    dx = function(*arguments, *grads, need_x)
    return [dx, *grads[0], *grads[1]]


def _double(value):
    if isinstance(value, list):
        return [_double(item) for item in value]
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


def _exact_several(arguments, slots):
    dy, x, weight, lora_a, lora_b, scalings, _, _, splits = map(_double, arguments)
    dx = torch.zeros_like(x) if weight is None else dy @ weight
    da, db = ([torch.zeros_like(t) for t in tensors] for tensors in (lora_a, lora_b))
    for slot in range(len(lora_a)):
        mine, start = slots == slot, 0
        for index, width in enumerate(splits or [dy.shape[1]]):
            columns = slice(start, start + width)
            a = lora_a[slot][index] if splits else lora_a[slot]
            scaled = scalings[slot] * dy[mine][:, columns]
            dx[mine] += scaled @ lora_b[slot][columns] @ a
            (da[slot][index] if splits else da[slot]).add_((scaled @ lora_b[slot][columns]).t() @ x[mine])
            db[slot][columns] = scaled.t() @ (x[mine] @ a.t())
            start += width
    return [dx, *da, *db]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("ranks", "splits"), [((4, 16, 7), None), ((5, 5, 5), [20, 0, 28])], ids=str)
def test_several_adapters(ranks, splits, dtypes, device):
    arguments, slots = _several(ranks, *DTYPES[dtypes], splits, device=device)
    eager, exact = _backward(multi_reference.multi_lora_backward, arguments), _exact_several(arguments, slots)
    for ours, theirs, true in zip(_backward(multi_train.multi_lora_backward, arguments), eager, exact, strict=True):
        assert_within_budget(ours, theirs, true)
    if splits:
        return
    arguments[2] = None
    dx = _backward(multi_train.multi_lora_backward, arguments)[0]
    eager, exact = _backward(multi_reference.multi_lora_backward, arguments), _exact_several(arguments, slots)
    assert_within_budget(dx, eager[0], exact[0], "without a base")


@pytest.mark.parametrize("tokens", [0, 1])
def test_several_adapters_of_few_rows(tokens, device):
    arguments, slots = _several((1, 2), torch.float32, tokens=tokens, features=8, outputs=8, device=device)
    found, exact = _backward(multi_train.multi_lora_backward, arguments), _exact_several(arguments, slots)
    for ours, true in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_adapters_in_training_are_isolated(poison, device):
    arguments, slots = _several((4, 8, 4), torch.float16, device=device)
    clean = _backward(multi_train.multi_lora_backward, arguments)
    arguments[3][1] = torch.full_like(arguments[3][1], poison)
    arguments[4][1] = torch.full_like(arguments[4][1], poison)
    dirty = _backward(multi_train.multi_lora_backward, arguments)
    assert torch.equal(clean[0][slots != 1], dirty[0][slots != 1])
    for slot in (0, 2):
        assert torch.equal(clean[1 + slot], dirty[1 + slot])
        assert torch.equal(clean[4 + slot], dirty[4 + slot])
    assert not torch.isfinite(dirty[0][slots == 1]).all()


def test_parts_of_a_skinny_product_are_summed_in_their_order(device):
    """Every plane is written: none holds the NaN that it starts with."""
    case = make_linear(50, 40, 33, 5, torch.float16, device=device)
    h = reference.shrink(case.x, case.lora_a, torch.empty(0), 0.0)
    grads, lows = triton_gradients.skinny(
        torch.ones(50, 33, dtype=torch.float16, device=device), case.lora_b.unsqueeze(0), None, right=h, need_low=True
    )
    assert torch.isfinite(grads).all()
    assert all(torch.isfinite(planes).all() for planes in lows)
    total = triton_gradients.sum_planes(torch.empty(33, 5, device=device), grads[:, 0])
    torch.testing.assert_close(total, h.half().float().sum(0).expand(33, 5))


def test_tiles_of_dx_do_not_depend_on_rows_where_they_must_not():
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        for itemsize in (2, 4):
            rules = (itemsize, False, False, True, False, capability)
            assert len({train_config.input_gradient(rows, *rules, True) for rows in (1, 65, 513, 9000)}) == 1
        # The planes of dh have a fixed width whatever the rows.
        strips = (2, False, False, True, capability, 132)
        widths = {train_config.skinny(m, lambda width: 8, 16, 1, *strips).block_n for m in (1, 65, 513, 9000)}
        assert len(widths) == 1


@pytest.mark.parametrize("rank", [1, 16, 64, 72, 512])
def test_ranks_under_a_mask_fill_the_rows_of_wgmma(rank):
    """Of half precision, where there is wgmma; elsewhere, and without a mask, as few columns as the rank takes."""

    def block_r(itemsize, mixed, masked, aligned, capability):
        rules = (itemsize, mixed, masked, aligned, capability, 132)
        tiles = train_config.skinny(8192, lambda width: -(-4096 // width), rank, 1, *rules)
        assert tiles.block_r in (16, 32, 64)
        return tiles.block_r

    least = train_config.block_rank(rank)[0]
    for aligned in (True, False):
        assert block_r(2, False, True, aligned, (9, 0)) == 64
        assert block_r(2, False, False, aligned, (9, 0)) == least
        for capability in ((0, 0), (8, 0), (8, 9), (10, 0), (12, 0)):
            assert block_r(2, False, True, aligned, capability) == least
        for itemsize, mixed in ((4, False), (2, True)):  # no wgmma there: three tf32 products, or float32
            assert block_r(itemsize, mixed, True, aligned, (9, 0)) == 16
