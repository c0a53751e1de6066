"""One call of every public op at a production size, for what must hold of all of them: graphs, compile, bits, syncs."""

import torch

import lora_kernels as lk
from lora_kernels.testing import make_linear, make_multi

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


def _banks(dtype):
    case = make_multi(TOKENS, FEATURES, OUTPUTS, RANK, SLOTS, dtype, device="cuda")
    return case, lk.ops.plan_batch(case.token_slots, case.slot_ranks, num_slots=SLOTS)


def _multi(dtype):
    case, plan = _banks(dtype)
    banks = (case.a_bank, case.b_bank, case.slot_scalings)
    run = lambda: lk.ops.multi_lora_linear(case.x, case.weight, case.bias, *banks, plan)  # noqa: E731
    return Call(run, list(banks), ["multi_lora_linear"])


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
    run = lambda: lk.ops.library.op("merge_is_finite")(case.weight, *terms, 1.0)  # noqa: E731
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
    "multi_lora_linear": _multi,
    "lora_shrink": _shrink,
    "lora_expand_": _expand,
    "merge_": _merge,
    "merge_is_finite": _merge_is_finite,
    "switch_": _switch,
}
