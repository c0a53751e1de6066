"""Offsets of more than 2³¹ elements: rows that lie so far apart give the bits of rows that are neighbours.

Every kernel that walks a large tensor but ``lora_linear`` itself, which ``test_triton_linear.py`` has, and at full size
``tests/gpu``. On a CPU only the pages that are touched take memory.
"""

import numpy as np
import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops.dora.api import row_norm
from lora_kernels.testing import make_embedding, make_grouped, make_linear, make_multi

triton_grouped = pytest.importorskip("lora_kernels.ops.grouped.triton")
triton_train = pytest.importorskip("lora_kernels.ops.linear.triton_train")
triton_multi = pytest.importorskip("lora_kernels.ops.multi.triton")
multi_train = pytest.importorskip("lora_kernels.ops.multi.triton_train")

APART = 2**31


@pytest.fixture(autouse=True)
def _on_a_cpu(device):
    if device != "cpu":
        pytest.skip("memory that is not touched is taken on a GPU")


def _far(tensor):
    """The same two rows, 2³¹ elements apart."""
    memory = torch.from_numpy(np.empty(APART + tensor.shape[1], np.float16))
    return memory.as_strided(tensor.shape, (APART, 1)).copy_(tensor)


def _merge(far):
    case = make_linear(1, 32, 2, 4, torch.float16)
    return lk.ops.merge_(far(case.weight), case.lora_a, case.lora_b, 0.5)


def _switch(far):
    old, new = (make_linear(1, 32, 2, 4, torch.float16, seed=seed) for seed in (0, 1))
    terms = [(case.lora_a, case.lora_b, case.scaling) for case in (old, new)]
    return lk.ops.switch_(far(old.weight), *terms)


def _row_norm(far):
    case = make_linear(1, 32, 2, 4, torch.float16)
    return row_norm(far(case.weight), case.lora_a, case.lora_b, case.scaling)


def _embedding(far):
    case = make_embedding(3, 2, 32, 4, torch.float16)
    return lk.ops.lora_embedding(case.ids, far(case.weight), *case.args()[2:])


def _weight(far):
    case = make_linear(3, 32, 2, 4, torch.float16)
    return lk.ops.lora_linear(case.x, far(case.weight), *case.args()[2:])


def _add(far):
    case = make_linear(2, 32, 24, 4, torch.float16)
    y = far(torch.ones(2, 24, dtype=torch.float16))
    return lk.ops.lora_add_(y, far(case.x), case.lora_a, case.lora_b, case.scaling)


def _grouped(far):
    case = make_grouped(2, 32, (24, 16), (4, 3), torch.float16)
    y = [far(torch.zeros(2, width, dtype=torch.float16)) for width in (24, 16)]
    h = triton_grouped.grouped_lora_linear(far(case.x), *case.args()[1:], y, True, False)
    return torch.cat([h, *(part.float() for part in y)], 1)


def _grouped_backward(far):
    case = make_grouped(2, 32, (24, 16), (4, 3), torch.float16)
    generator = torch.Generator().manual_seed(0)
    dy = [far(torch.randn(2, width, generator=generator).half()) for width in (24, 16)]
    h = torch.randn(2, 7, generator=generator)
    da, db = ([torch.empty_like(factor) for factor in factors] for factors in (case.lora_a, case.lora_b))
    terms = (case.weights, case.lora_a, case.lora_b, case.scalings)
    dx = triton_grouped.grouped_lora_backward(far(case.x), dy, *terms, h, da, db, True, False)
    return torch.cat([part.flatten() for part in (dx, *da, *db)])


def _backward(far, p=0.0):
    case = make_linear(2, 32, 24, 4, torch.float16)
    dy, scaling = torch.randn(2, 24, generator=torch.Generator().manual_seed(0)).half(), case.scaling
    y, h, mask = triton_train.lora_linear_train(
        far(case.x), case.weight, None, case.lora_a, case.lora_b, scaling, p, torch.tensor(3), None, False
    )
    needed = (None, True, True, True, False)
    grads = triton_train.lora_linear_backward(
        far(dy), far(case.x), case.weight, case.lora_a, case.lora_b, scaling, h, mask, p, *needed
    )
    return torch.cat([part.flatten() for part in (y, *grads)])


def _backward_under_dropout(far):
    return _backward(far, 0.3)


def _several(far, run):
    case = make_multi(2, 32, 24, 4, 3, torch.float16)
    case.token_slots.copy_(torch.tensor([1, 0]))
    plan = lk.ops.plan_batch(case.token_slots, case.slot_ranks, num_slots=3)
    return run(case, plan)


def _several_backward(far):
    def run(case, plan):
        dy = far(torch.randn(2, 24, generator=torch.Generator().manual_seed(0)).half())
        adapters = [list(bank.unbind()) for bank in (case.a_bank, case.b_bank)]
        grads = [[torch.empty_like(factor) for factor in factors] for factors in adapters]
        terms = (*adapters, case.slot_scalings, plan.row_order, plan.segment_starts, None)
        dx = multi_train.multi_lora_backward(dy, far(case.x), case.weight, *terms, *grads, True)
        return torch.cat([part.flatten() for part in (dx, *grads[0], *grads[1])])

    return _several(far, run)


def _multi(far):
    def run(case, plan):
        banks = (case.a_bank, case.b_bank, case.slot_scalings)
        return lk.ops.multi_lora_linear(far(case.x), case.weight, case.bias, *banks, plan)

    return _several(far, run)


def _shrink(far):
    return _several(far, lambda case, plan: lk.ops.lora_shrink(far(case.x), case.a_bank, plan))


def _expand(far):
    def run(case, plan):
        y, h = far(torch.ones(2, 24, dtype=torch.float16)), torch.ones(2, 4)
        return lk.ops.lora_expand_(y, h, case.b_bank, case.slot_scalings, plan)

    return _several(far, run)


def _multi_route(route):
    def call(far):
        choose = triton_multi.config.choose
        with pytest.MonkeyPatch.context() as patch:
            forced = lambda *args, **rules: _with_route(choose(*args, **rules), route)  # noqa: E731
            patch.setattr(triton_multi.config, "choose", forced)
            return _multi(far)

    return call


def _with_route(found, route):
    return triton_multi.config.Config(route, found.base, found.shrink, found.expand)


CALLS = {
    "merge_": _merge,
    "switch_": _switch,
    "row_norm": _row_norm,
    "lora_embedding": _embedding,
    "lora_linear, weight": _weight,
    "lora_add_": _add,
    "grouped_lora_linear": _grouped,
    "grouped_lora_linear, gradients": _grouped_backward,
    "lora_linear, gradients": _backward,
    "lora_linear, dropout": _backward_under_dropout,
    "multi_lora_linear, decode": _multi_route("decode"),
    "multi_lora_linear, fused": _multi_route("fused"),
    "multi_lora_linear, gradients": _several_backward,
    "lora_shrink": _shrink,
    "lora_expand_": _expand,
}


@pytest.mark.parametrize("call", CALLS)
def test_rows_two_to_the_31_apart(call):
    near = CALLS[call](torch.clone)
    assert torch.isfinite(near).all()
    assert near.any()
    assert torch.equal(CALLS[call](_far), near)
