"""What ``check`` runs of the ops that change or read the weight: merging, plain and exact, and DoRA's row norm."""

import torch

from .. import ops
from ..ops.dispatch import use_backend
from ..ops.dora.api import row_norm
from ..testing import exact_merge, make_linear
from .products import same_bits


def _merge(shape, dtype, adapter_dtype, device, sign=1.0):
    case = make_linear(*shape, dtype, adapter_dtype, device=device)
    run = ops.merge_ if sign > 0 else ops.unmerge_
    terms = (case.lora_a, case.lora_b, case.scaling)
    ours = run(case.weight.clone(), *terms)
    yield ours, _eager_merge(case.weight, *terms, sign), exact_merge(case.weight, (*terms[:2], sign * case.scaling))


def _unmerge(shape, dtype, adapter_dtype, device):
    return _merge(shape, dtype, adapter_dtype, device, sign=-1.0)


def _merge_list(shape, dtype, adapter_dtype, device):
    cases = [make_linear(*shape, dtype, adapter_dtype, device=device, seed=seed) for seed in range(3)]
    weights = [case.weight.clone() for case in cases]
    adapters = [(case.lora_a, case.lora_b, case.scaling) for case in cases]
    ops.merge_list_(weights, adapters)
    for case, ours, terms in zip(cases, weights, adapters, strict=True):
        yield ours, _eager_merge(case.weight, *terms, 1.0), exact_merge(case.weight, terms)


def _merge_safe(shape, dtype, adapter_dtype, device):
    """Passes what is finite, and leaves the weight alone where one element would not be."""
    case = make_linear(*shape, dtype, adapter_dtype, device=device)
    terms = (case.lora_a, case.lora_b, case.scaling)
    ours = ops.merge_(case.weight.clone(), *terms, safe=True)
    yield ours, _eager_merge(case.weight, *terms, 1.0), exact_merge(case.weight, terms)
    case.weight[-1, -1] = torch.inf
    weight, refused = case.weight.clone(), False
    try:
        ops.merge_(weight, *terms, safe=True)
    except ValueError:
        refused = True
    yield same_bits(torch.tensor(refused), torch.tensor(True))
    yield same_bits(weight, case.weight)


def _switch(shape, dtype, adapter_dtype, device):
    first, second = (make_linear(*shape, dtype, adapter_dtype, device=device, seed=seed) for seed in (0, 1))
    old, new = ((case.lora_a, case.lora_b, case.scaling) for case in (first, second))
    ours = ops.switch_(first.weight.clone(), old, new)
    eager = _eager_merge(_eager_merge(first.weight, *old, -1.0), *new, 1.0)
    yield ours, eager, exact_merge(first.weight, (*old[:2], -old[2]), new)


def _merge_exact(shape, dtype, adapter_dtype, device):
    """Merge, switch and unmerge: weights and residuals have the reference's bits, and the last are the first. Of
    several blocks at most: the reference takes its time."""
    rows, columns, outputs, rank = shape
    shape = rows, min(columns, 131), min(outputs, 67), rank
    first, second = (make_linear(*shape, dtype, adapter_dtype, device=device, seed=seed) for seed in (0, 1))
    old, new = ((case.lora_a, case.lora_b, case.scaling) for case in (first, second))

    def walk(weight, old, new):
        weight, states = weight.clone(), []
        residual = ops.merge_exact_(weight, *old)
        states += [weight.clone(), residual.body]
        residual = ops.switch_exact_(weight, old, new, residual)
        states += [weight.clone(), residual.body]
        ops.unmerge_exact_(weight, *new, residual)
        return [*states, weight]

    ours = walk(first.weight, old, new)
    with use_backend("reference"):
        expected = walk(first.weight.cpu(), *([part.cpu() for part in terms] for terms in (old, new)))
    for found, wanted in zip(ours, expected, strict=True):
        yield same_bits(found.cpu(), wanted)
    yield same_bits(ours[-1], first.weight)


def _row_norm(shape, dtype, adapter_dtype, device):
    case = make_linear(*shape, dtype, adapter_dtype, device=device)
    terms = (case.lora_a, case.lora_b, case.scaling)
    eager = case.weight.float() + (case.lora_b.float() @ case.lora_a.float()) * case.scaling
    yield row_norm(case.weight, *terms), eager.norm(dim=1), exact_merge(case.weight, terms).norm(dim=1)


def _eager_merge(weight, lora_a, lora_b, scaling, sign):
    return weight + ((lora_b @ lora_a) * (sign * float(scaling))).to(weight.dtype)


_EXACT = ("merge_exact_", "unmerge_exact_", "switch_exact_")
# Check -> (case, the ops that it needs).
CHECKS = {
    "merge_": (_merge, ("merge_",)),
    "unmerge_": (_unmerge, ("merge_",)),
    "merge_list_": (_merge_list, ("merge_list_",)),
    "merge_, safe": (_merge_safe, ("merge_is_finite", "merge_")),
    "switch_": (_switch, ("switch_",)),
    "exact merging": (_merge_exact, _EXACT),
    "row_norm": (_row_norm, ("row_norm",)),
}
