"""Many adapters on Triton on a GPU, route by route at real sizes: float64, isolation, base-only rows, bits."""

import dataclasses

import pytest
import torch

import lora_kernels as lk
from lora_kernels.check import eager_multi, exact_multi
from lora_kernels.ops.multi import config
from lora_kernels.testing import DTYPES, assert_within_budget, make_multi

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("triton_on_a_gpu")]
ROUTES = ("decode", "fused", "vendor")
# M, K, N, max_rank, slots; ``decode`` streams W for few rows.
SHAPES = ((1, 4096, 1024, 16, 4), (48, 2048, 4096, 64, 64), (64, 1031, 997, 20, 7))
MANY_ROWS = ((300, 2048, 1024, 16, 8), (2048, 4096, 4096, 16, 3), (515, 1031, 997, 40, 5))


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    """Runs the test once a route; the tiles are those that the rules give for it."""
    choose = config.choose

    def forced(num_tokens, *sizes, **rules):
        # Few rows have tiles for every route; many have none for ``decode``.
        found = choose(min(num_tokens, 64) if request.param == "decode" else num_tokens, *sizes, **rules)
        return dataclasses.replace(found, route=request.param)

    monkeypatch.setattr(config, "choose", forced)
    return request.param


def _run(case, listed=False):
    if not listed:
        plan = lk.ops.plan_batch(case.token_slots, case.slot_ranks, num_slots=len(case.slot_ranks))
        return lk.ops.multi_lora_linear(
            case.x, case.weight, case.bias, case.a_bank, case.b_bank, case.slot_scalings, plan
        )
    ranks = case.slot_ranks.tolist()
    lora_a = [case.a_bank[slot, :rank].contiguous() for slot, rank in enumerate(ranks)]
    lora_b = [case.b_bank[slot, :, :rank].contiguous() for slot, rank in enumerate(ranks)]
    plan = lk.ops.plan_batch(case.token_slots, num_slots=len(ranks))
    return lk.ops.multi_lora_linear(case.x, case.weight, case.bias, lora_a, lora_b, case.slot_scalings, plan)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_within_budget(route, dtypes, listed):
    for shape in SHAPES if route == "decode" else SHAPES + MANY_ROWS:
        case = make_multi(*shape, *DTYPES[dtypes], device="cuda")
        assert_within_budget(_run(case, listed), eager_multi(case), exact_multi(case), f"{route} {shape}")


def test_an_inf_in_one_adapter_changes_no_bit_of_another(route):
    case = make_multi(60, 1024, 768, 16, 6, torch.bfloat16, device="cuda")
    clean = _run(case)
    case.a_bank[2], case.b_bank[2] = torch.inf, torch.nan
    others = case.token_slots != 2
    assert torch.equal(_run(case)[others], clean[others])
    assert not _run(case)[~others].isfinite().any()


def test_base_only_rows_have_the_bits_of_no_adapter(route):
    case = make_multi(60, 1024, 768, 16, 6, torch.bfloat16, device="cuda")
    y, rows = _run(case), case.token_slots < 0
    case.token_slots = torch.full_like(case.token_slots, -1)
    assert torch.equal(_run(case)[rows], y[rows])


def test_the_same_call_gives_the_same_bits(route):
    case = make_multi(60, 4096, 4096, 16, 6, torch.bfloat16, device="cuda")
    first = _run(case)
    assert all(torch.equal(_run(case), first) for _ in range(5))


@pytest.mark.parametrize("slices", [[512, 128, 128], [768, 0]])
def test_slices(route, slices):
    case = make_multi(50, 1024, 768, 16, 4, torch.bfloat16, slices=len(slices), device="cuda")
    plan = lk.ops.plan_batch(case.token_slots, num_slots=4)
    banks = (case.a_bank, case.b_bank, case.slot_scalings)
    y = lk.ops.multi_lora_linear(case.x, case.weight, case.bias, *banks, plan, out_splits=slices)
    begin = 0
    for index, width in enumerate(slices):
        part = slice(begin, begin + width)
        one = dataclasses.replace(
            case, weight=case.weight[part], bias=case.bias[part], a_bank=case.a_bank[:, index],
            b_bank=case.b_bank[:, part], slot_ranks=torch.full_like(case.slot_ranks, 16),
        )  # fmt: skip
        if width:
            assert_within_budget(y[:, part], eager_multi(one), exact_multi(one), f"slice {index}")
        begin += width
