"""One call of every public op at a production size, for what must hold of all of them: graphs, compile, bits, syncs."""

import torch

import lora_kernels as lk
from lora_kernels.ops import library
from lora_kernels.ops.dora.api import row_norm
from lora_kernels.testing import make_embedding, make_grouped, make_linear, make_multi

TOKENS, FEATURES, OUTPUTS, RANK, SLOTS = 300, 1024, 2048, 16, 6


class Call:
    """``run()`` makes the call and returns what it computed; ``adapters`` are the tensors that a user may overwrite
    between two runs; ``needs`` are the ops that a backend must have."""

    def __init__(self, run, adapters, needs):
        self.run, self.adapters, self.needs = run, adapters, needs


def _case(dtype, tokens=TOKENS, **options):
    return make_linear(tokens, FEATURES, OUTPUTS, RANK, dtype, device="cuda", **options)


def _linear(dtype, tokens=TOKENS):
    case = _case(dtype, tokens)
    return Call(lambda: lk.ops.lora_linear(*case.args()), [case.lora_a, case.lora_b, case.scaling], ["lora_linear"])


def _few_rows(dtype):
    return _linear(dtype, tokens=3)


def _slices(dtype):
    case = _case(dtype, slices=3)
    splits = [OUTPUTS // 2, OUTPUTS // 4, OUTPUTS // 4]
    run = lambda: lk.ops.lora_linear(*case.args(), out_splits=splits)  # noqa: E731
    return Call(run, [case.lora_a, case.lora_b, case.scaling], ["lora_linear"])


def _out(dtype):
    case = _case(dtype)
    out = torch.empty((TOKENS, OUTPUTS), dtype=dtype, device="cuda")
    run = lambda: lk.ops.lora_linear(*case.args(), out=out)  # noqa: E731
    return Call(run, [case.lora_a, case.lora_b, case.scaling], ["lora_linear_out"])


def _add(dtype):
    case = _case(dtype)
    y = torch.zeros((TOKENS, OUTPUTS), dtype=dtype, device="cuda")
    terms = (case.x, case.lora_a, case.lora_b, case.scaling)
    return Call(lambda: lk.ops.lora_add_(y.zero_(), *terms), list(terms[1:]), ["lora_add_"])


def _train(dtype, dropout_p=0.0):
    case = _case(dtype)
    leaves = [t.requires_grad_() for t in (case.x, case.lora_a, case.lora_b)]
    dy, seed = torch.ones((TOKENS, OUTPUTS), dtype=dtype, device="cuda"), torch.tensor(7, device="cuda")

    def run():
        with torch.enable_grad():
            y = lk.ops.lora_linear(*case.args(), dropout_p=dropout_p, dropout_seed=seed)
            return torch.cat([y.flatten(), *(grad.flatten() for grad in torch.autograd.grad(y, leaves, dy))])

    adapters = [case.lora_a.detach(), case.lora_b.detach(), case.scaling]
    return Call(run, adapters, ["lora_linear_train", "lora_linear_backward"])


def _dropout(dtype):
    return _train(dtype, dropout_p=0.1)


def _add_train(dtype):
    case = _case(dtype)
    leaves = [t.requires_grad_() for t in (case.x, case.lora_a, case.lora_b)]
    dy, seed = torch.ones((TOKENS, OUTPUTS), dtype=dtype, device="cuda"), torch.tensor(7, device="cuda")

    def run():
        with torch.enable_grad():
            terms = (case.x, case.lora_a, case.lora_b, case.scaling)
            y = lk.ops.lora_add_(torch.zeros_like(dy), *terms, dropout_p=0.1, dropout_seed=seed)
            return torch.cat([part.flatten() for part in (y, *torch.autograd.grad(y, leaves, dy))])

    adapters = [case.lora_a.detach(), case.lora_b.detach(), case.scaling]
    return Call(run, adapters, ["lora_add_train_", "lora_linear_backward"])


def _banks(dtype):
    case = make_multi(TOKENS, FEATURES, OUTPUTS, RANK, SLOTS, dtype, device="cuda")
    return case, lk.ops.plan_batch(case.token_slots, case.slot_ranks, num_slots=SLOTS)


def _multi(dtype):
    case, plan = _banks(dtype)
    banks = (case.a_bank, case.b_bank, case.slot_scalings)
    run = lambda: lk.ops.multi_lora_linear(case.x, case.weight, case.bias, *banks, plan)  # noqa: E731
    return Call(run, list(banks), ["multi_lora_linear"])


def _multi_list(dtype):
    case, _ = _banks(dtype)
    plan = lk.ops.plan_batch(case.token_slots, num_slots=SLOTS)
    ranks = case.slot_ranks.tolist()
    lora_a = [case.a_bank[slot, :rank].contiguous() for slot, rank in enumerate(ranks)]
    lora_b = [case.b_bank[slot, :, :rank].contiguous() for slot, rank in enumerate(ranks)]
    terms = (lora_a, lora_b, case.slot_scalings, plan)
    run = lambda: lk.ops.multi_lora_linear(case.x, case.weight, case.bias, *terms)  # noqa: E731
    return Call(run, [*lora_a, *lora_b, case.slot_scalings], ["multi_lora_linear_list"])


def _multi_train(dtype):
    case, _ = _banks(dtype)
    plan = lk.ops.plan_batch(case.token_slots, num_slots=SLOTS)
    lora_a, lora_b = ([factor.clone() for factor in bank.unbind()] for bank in (case.a_bank, case.b_bank))
    leaves = [t.requires_grad_() for t in (case.x, *lora_a, *lora_b)]
    dy = torch.ones((TOKENS, OUTPUTS), dtype=dtype, device="cuda")

    def run():
        with torch.enable_grad():
            terms = (lora_a, lora_b, case.slot_scalings, plan)
            y = lk.ops.multi_lora_linear(case.x, case.weight, case.bias, *terms)
            return torch.cat([part.flatten() for part in (y, *torch.autograd.grad(y, leaves, dy))])

    adapters = [t.detach() for t in (*lora_a, *lora_b)]
    return Call(run, adapters, ["multi_lora_linear_list", "multi_lora_backward"])


def _grouped(dtype, tokens=TOKENS):
    case = make_grouped(tokens, FEATURES, (OUTPUTS, 512, 512), (RANK, RANK, 8), dtype, device="cuda")
    run = lambda: torch.cat(lk.ops.grouped_lora_linear(*case.args()), 1)  # noqa: E731
    return Call(run, [*case.lora_a, *case.lora_b, *case.scalings], ["grouped_lora_linear"])


def _grouped_few_rows(dtype):
    return _grouped(dtype, tokens=3)


def _grouped_train(dtype):
    case = make_grouped(TOKENS, FEATURES, (OUTPUTS, 512, 512), (RANK, RANK, 8), dtype, device="cuda")
    leaves = [t.requires_grad_() for t in (case.x, *case.lora_a, *case.lora_b)]
    dy = [torch.ones((TOKENS, width), dtype=dtype, device="cuda") for width in (OUTPUTS, 512, 512)]

    def run():
        with torch.enable_grad():
            y = lk.ops.grouped_lora_linear(*case.args())
            return torch.cat([part.flatten() for part in (*y, *torch.autograd.grad(y, leaves, dy))])

    adapters = [t.detach() for t in (*case.lora_a, *case.lora_b)]
    return Call(run, adapters, ["grouped_lora_linear", "grouped_lora_backward"])


def _embedding(dtype):
    case = make_embedding(TOKENS, 5000, FEATURES, RANK, dtype, device="cuda")
    run = lambda: lk.ops.lora_embedding(*case.args())  # noqa: E731
    return Call(run, [case.lora_a, case.lora_b, case.scaling], ["lora_embedding"])


def _embedding_train(dtype):
    case = make_embedding(TOKENS, 100, FEATURES, RANK, dtype, device="cuda")
    leaves = [case.lora_a.requires_grad_(), case.lora_b.requires_grad_()]
    dy = torch.ones((TOKENS, FEATURES), dtype=dtype, device="cuda")

    def run():
        with torch.enable_grad():
            y = lk.ops.lora_embedding(*case.args(), padding_idx=3)
            return torch.cat([part.flatten() for part in (y, *torch.autograd.grad(y, leaves, dy))])

    adapters = [case.lora_a.detach(), case.lora_b.detach(), case.scaling]
    return Call(run, adapters, ["lora_embedding", "lora_embedding_backward"])


def _row_norm(dtype):
    case = _case(dtype)
    terms = (case.lora_a, case.lora_b, case.scaling)
    return Call(lambda: row_norm(case.weight, *terms), list(terms), ["row_norm"])


def _shrink(dtype):
    case, plan = _banks(dtype)
    return Call(lambda: lk.ops.lora_shrink(case.x, case.a_bank, plan), [case.a_bank], ["lora_shrink"])


def _expand(dtype):
    case, plan = _banks(dtype)
    h = torch.randn(TOKENS, RANK, device="cuda")
    y = torch.zeros((TOKENS, OUTPUTS), dtype=dtype, device="cuda")
    run = lambda: lk.ops.lora_expand_(y.zero_(), h, case.b_bank, case.slot_scalings, plan)  # noqa: E731
    return Call(run, [case.b_bank, case.slot_scalings], ["lora_expand_"])


def _merge(dtype):
    case = _case(dtype)
    terms, weight = (case.lora_a, case.lora_b, case.scaling), torch.empty_like(case.weight)
    return Call(lambda: lk.ops.merge_(weight.copy_(case.weight), *terms), list(terms), ["merge_"])


def _merge_is_finite(dtype):
    case = _case(dtype)
    terms = (case.lora_a, case.lora_b, case.scaling)
    run = lambda: library.op("merge_is_finite")(case.weight, *terms, 1.0)  # noqa: E731
    return Call(run, list(terms), ["merge_is_finite"])


def _switch(dtype):
    old, new = _case(dtype), _case(dtype, seed=1)
    weight = torch.empty_like(old.weight)
    terms = [(case.lora_a, case.lora_b, case.scaling) for case in (old, new)]
    return Call(lambda: lk.ops.switch_(weight.copy_(old.weight), *terms), list(terms[1]), ["switch_"])


CALLS = {
    "lora_linear": _linear,
    "lora_linear, 3 rows": _few_rows,
    "lora_linear, slices": _slices,
    "lora_linear, out": _out,
    "lora_linear, gradients": _train,
    "lora_linear, dropout": _dropout,
    "lora_add_": _add,
    "lora_add_, gradients": _add_train,
    "multi_lora_linear": _multi,
    "multi_lora_linear, list": _multi_list,
    "multi_lora_linear, gradients": _multi_train,
    "grouped_lora_linear": _grouped,
    "grouped_lora_linear, 3 rows": _grouped_few_rows,
    "grouped_lora_linear, gradients": _grouped_train,
    "lora_embedding": _embedding,
    "lora_embedding, gradients": _embedding_train,
    "row_norm": _row_norm,
    "lora_shrink": _shrink,
    "lora_expand_": _expand,
    "merge_": _merge,
    "merge_is_finite": _merge_is_finite,
    "switch_": _switch,
}
