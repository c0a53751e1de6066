"""`python -m lora_kernels check`: every op on every backend that can run here, against float64.

A figure is error / budget (see testing/budget.py), the worst of the shapes; above 1 fails.
"""

import argparse
import time

import torch
import torch.nn.functional as F

from . import ops
from .ops import cuda_choice, dispatch, library, triton_backend
from .ops.linear.dropout import dropout_mask, unpack_mask
from .testing import (
    eager_lora_linear,
    eager_multi_lora_linear,
    error_ratio,
    exact_lora_linear,
    exact_merge,
    exact_multi_lora_linear,
    make_grouped,
    make_linear,
    make_multi,
)

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bf16, A and B f32": (torch.bfloat16, torch.float32),
}
SHAPES = ((1, 256, 192, 16), (8, 131, 67, 5), (70, 384, 384, 8), (130, 128, 96, 64))  # M, K, N, rank
INTERPRETED_SHAPES = ((1, 64, 48, 5), (20, 70, 33, 24))  # Triton's interpreter is slow
NUM_SLOTS = 5


def main(argv=None):
    parser = argparse.ArgumentParser(prog="lora_kernels check", description="self-test of every op against float64")
    parser.add_argument("--backend", choices=dispatch.BACKENDS[1:], help="only this one; default: all that can run")
    args = parser.parse_args(argv)
    start, failures = time.perf_counter(), []
    print(f"{'op':<28}" + "".join(f"{name:>19}" for name in DTYPES) + "   (error / budget)")
    for backend in [args.backend] if args.backend else dispatch.BACKENDS[1:]:
        reason = dispatch.unavailable(backend)
        if reason is None and args.backend is None and backend == "triton" and triton_backend.interpreted():
            reason = "only in Triton's interpreter, which is slow: ask for it by name"
        if reason is not None:
            print(f"\n{backend}: can not run here: {reason}")
            failures += [f"{backend}: {reason}"] if args.backend else []
            continue
        for device in _devices(backend):
            print(f"\n{backend} on {device}")
            failures += _check_backend(backend, device)
    print(f"\n{len(failures)} failed, {time.perf_counter() - start:.1f} s")
    for failure in failures:
        print(f"  {failure}")
    return 1 if failures else 0


def _devices(backend):
    if backend == "reference":
        return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return ["cpu"] if backend == "cpu" or (backend == "triton" and triton_backend.interpreted()) else ["cuda"]


def _check_backend(backend, device):
    failures, shapes = [], INTERPRETED_SHAPES if backend == "triton" and device == "cpu" else SHAPES
    for name, check in CHECKS.items():
        missing = [op for op in NEEDS[name] if not _has(backend, op)]
        if missing:
            print(f"  {name:<26}   not checked: no kernel for {', '.join(missing)}")
            continue
        cells = []
        for label, dtypes in DTYPES.items():
            try:
                with dispatch.use_backend(backend):
                    ratio = max(_worst(check(shape, *dtypes, device)) for shape in shapes)
                bad, cell = not ratio <= 1, f"{ratio:.2f}"  # a NaN fails
                reason = f"error is {ratio:.2f} of the budget"
            except cuda_choice.Refused:
                bad, cell = False, "refused"
            except Exception as error:  # one broken op must not hide the others
                bad, cell, reason = True, type(error).__name__, f"{type(error).__name__}: {error}"
            cells.append(f"{cell} FAIL" if bad else cell)
            if bad:
                failures.append(f"{backend} on {device}, {name}, {label}: {reason}")
        print(f"  {name:<26}" + "".join(f"{cell:>19}" for cell in cells))
    return failures


def _has(backend, op):
    """Whether the backend has a kernel of its own for an op."""
    if backend in ("reference", "cpu"):
        return backend == "reference" or library.has_cpu_kernel(op)
    return op in triton_backend.kernels() if backend == "triton" else cuda_choice.refusal("cuda", op, ()) is None


def _worst(results):
    return max(error_ratio(*result) for result in results)


def _linear(shape, dtype, adapter_dtype, device):
    case = make_linear(*shape, dtype, adapter_dtype, device=device)
    alone = make_linear(*shape, dtype, adapter_dtype, base=False, device=device)
    for args in (case.args(), alone.args()):  # a big base would hide a wrong update
        yield ops.lora_linear(*args), eager_lora_linear(*args), exact_lora_linear(*args)


def _linear_backward(shape, dtype, adapter_dtype, device, dropout_p=0.0):
    case = make_linear(*shape, dtype, adapter_dtype, device=device)
    seed, keep = torch.tensor(7, device=device), None
    if dropout_p:
        mask = dropout_mask(seed, *case.x.shape, dropout_p)
        keep = unpack_mask(mask, case.x.shape[1]).to(torch.float64) / (1 - dropout_p)
    dy = make_linear(shape[0], shape[2], 1, 1, dtype, seed=1, device=device).x

    def gradients(run, cast, **kwargs):
        inputs = [None if t is None else cast(t.detach()).requires_grad_() for t in case.args()[:5]]
        y = run(*inputs, case.scaling, **kwargs)
        leaves = [inputs[0], inputs[3], inputs[4]]
        return y.detach(), *torch.autograd.grad(y, leaves, cast(dy))

    ours = gradients(ops.lora_linear, torch.clone, dropout_p=dropout_p, dropout_seed=seed)
    eager = gradients(eager_lora_linear, torch.clone, keep=keep)
    exact = gradients(exact_lora_linear, torch.Tensor.double, keep=keep)
    yield from zip(ours, eager, exact, strict=True)


def _dropout_backward(shape, dtype, adapter_dtype, device):
    return _linear_backward(shape, dtype, adapter_dtype, device, dropout_p=0.25)


def _add(shape, dtype, adapter_dtype, device):
    case = make_linear(*shape, dtype, adapter_dtype, device=device)
    y = F.linear(case.x, case.weight, case.bias)
    update = (case.x, torch.zeros_like(case.weight), None, case.lora_a, case.lora_b, case.scaling)
    exact = y.double() + exact_lora_linear(*update)
    eager = (y + eager_lora_linear(*update)).to(dtype)
    yield ops.lora_add_(y, case.x, case.lora_a, case.lora_b, case.scaling), eager, exact


def _multi(shape, dtype, adapter_dtype, device):
    case = make_multi(*shape, NUM_SLOTS, dtype, adapter_dtype, device=device)
    plan = ops.plan_batch(case.token_slots, case.slot_ranks)
    banks = (case.a_bank, case.b_bank, case.slot_scalings)
    ours = ops.multi_lora_linear(case.x, case.weight, case.bias, *banks, plan)
    yield ours, _eager_multi(case), _exact_multi(case)


def _multi_list(shape, dtype, adapter_dtype, device):
    case = make_multi(*shape, NUM_SLOTS, dtype, adapter_dtype, device=device)
    ranks = case.slot_ranks.tolist()
    lora_a = [case.a_bank[slot, :rank].contiguous() for slot, rank in enumerate(ranks)]
    lora_b = [case.b_bank[slot, :, :rank].contiguous() for slot, rank in enumerate(ranks)]
    plan = ops.plan_batch(case.token_slots, num_slots=NUM_SLOTS)
    ours = ops.multi_lora_linear(case.x, case.weight, case.bias, lora_a, lora_b, case.slot_scalings, plan)
    yield ours, _eager_multi(case), _exact_multi(case)


def _grouped(shape, dtype, adapter_dtype, device):
    """Two projections of one input, and the gradients of x and of the factors."""
    num_tokens, features, outputs, rank = shape
    sizes = (num_tokens, features, (outputs, outputs // 2), (rank, rank + 3))
    case = make_grouped(*sizes, dtype, adapter_dtype, device=device)

    def results(run, cast):
        groups = [[cast(t.detach()).requires_grad_() for t in group] for group in case.groups()]
        y = run(groups[0][0], *groups[1:])
        leaves = [*groups[0], *groups[3], *groups[4]]
        return (*y, *torch.autograd.grad(y, leaves, [torch.ones_like(part) for part in y]))

    def apart(one):
        return lambda x, *groups: [one(x, *each, s) for *each, s in zip(*groups, case.scalings, strict=True)]

    ours = results(lambda *args: ops.grouped_lora_linear(*args, case.scalings), torch.clone)
    yield from zip(
        ours, results(apart(eager_lora_linear), torch.clone), results(apart(exact_lora_linear), torch.Tensor.double),
        strict=True,
    )  # fmt: skip


def _shrink_expand(shape, dtype, adapter_dtype, device):
    case = make_multi(*shape, NUM_SLOTS, dtype, adapter_dtype, device=device)
    plan = ops.plan_batch(case.token_slots, case.slot_ranks)
    y = F.linear(case.x, case.weight, case.bias)
    exact = _exact_multi(case) + (y.double() - F.linear(case.x.double(), case.weight.double(), case.bias.double()))
    h = ops.lora_shrink(case.x, case.a_bank, plan)
    yield ops.lora_expand_(y, h, case.b_bank, case.slot_scalings, plan), _eager_multi(case), exact


def _merge(shape, dtype, adapter_dtype, device, sign=1.0):
    case = make_linear(*shape, dtype, adapter_dtype, device=device)
    run = ops.merge_ if sign > 0 else ops.unmerge_
    terms = (case.lora_a, case.lora_b, case.scaling)
    ours = run(case.weight.clone(), *terms)
    yield ours, _eager_merge(case.weight, *terms, sign), exact_merge(case.weight, (*terms[:2], sign * case.scaling))


def _unmerge(shape, dtype, adapter_dtype, device):
    return _merge(shape, dtype, adapter_dtype, device, sign=-1.0)


def _switch(shape, dtype, adapter_dtype, device):
    first, second = (make_linear(*shape, dtype, adapter_dtype, device=device, seed=seed) for seed in (0, 1))
    old, new = ((case.lora_a, case.lora_b, case.scaling) for case in (first, second))
    ours = ops.switch_(first.weight.clone(), old, new)
    eager = _eager_merge(_eager_merge(first.weight, *old, -1.0), *new, 1.0)
    yield ours, eager, exact_merge(first.weight, (*old[:2], -old[2]), new)


def _eager_merge(weight, lora_a, lora_b, scaling, sign):
    return weight + ((lora_b @ lora_a) * (sign * float(scaling))).to(weight.dtype)


def _eager_multi(case):
    return eager_multi_lora_linear(*_terms(case))


def _exact_multi(case):
    return exact_multi_lora_linear(*_terms(case))


def _terms(case):
    banks = (case.a_bank, case.b_bank, case.slot_scalings)
    return case.x, case.weight, case.bias, *banks, case.token_slots, case.slot_ranks


CHECKS = {
    "lora_linear": _linear,
    "lora_linear, gradients": _linear_backward,
    "lora_linear, dropout": _dropout_backward,
    "lora_add_": _add,
    "multi_lora_linear, banks": _multi,
    "multi_lora_linear, lists": _multi_list,
    "grouped_lora_linear": _grouped,
    "lora_shrink, lora_expand_": _shrink_expand,
    "merge_": _merge,
    "unmerge_": _unmerge,
    "switch_": _switch,
}
# The ops behind each check; where a GPU backend lacks one, the check is left out by name.
_TRAIN = ("lora_linear_train", "lora_linear_backward")
NEEDS = {
    "lora_linear": ("lora_linear",),
    "lora_linear, gradients": _TRAIN,
    "lora_linear, dropout": _TRAIN,
    "lora_add_": ("lora_add_",),
    "multi_lora_linear, banks": ("multi_lora_linear",),
    "multi_lora_linear, lists": ("multi_lora_linear_list",),
    "grouped_lora_linear": ("grouped_lora_linear", "grouped_lora_backward"),
    "lora_shrink, lora_expand_": ("lora_shrink", "lora_expand_"),
    "merge_": ("merge_",),
    "unmerge_": ("merge_",),
    "switch_": ("switch_",),
}
