"""Correctness on the fresh model: mixed batches, switch, merge and unmerge, each against its error budget.

A budget is ‖eager − float64‖ plus one rounding of the result, eager being plain torch in the same dtype. Two
results that keep it may lie two budgets apart. Each comparison is made row by row; the worst row counts, and
since a row of a whole model is a small sample, it is allowed two budgets from float64 as well.
"""

import copy
import dataclasses

import torch
from torch import nn

from ..ops.dispatch import use_backend
from ..testing import eager_lora_linear


@dataclasses.dataclass
class Claim:
    """What the run asserts, and whether it held; the exit code of the demo is made of these."""

    text: str
    holds: bool
    figure: str


class EagerLora(nn.Module):
    """A LoRA layer in plain torch: what the budget is made of."""

    def __init__(self, base, lora_a, lora_b, scaling):
        super().__init__()
        self.base, self.lora_a, self.lora_b, self.scaling = base, lora_a, lora_b, scaling

    def forward(self, x):
        base = self.base
        return eager_lora_linear(x, base.weight, base.bias, self.lora_a, self.lora_b, self.scaling)


def adapters_of(model, name):
    """{path of a layer in the classifier: (lora_a, lora_b, scaling)} of one adapter of a PeftModel, copied."""
    found = {}
    for path, module in model.get_base_model().named_modules():
        if name in getattr(module, "lora_A", ()):
            lora_a, lora_b = module.lora_A[name].weight, module.lora_B[name].weight
            found[path] = lora_a.detach().clone(), lora_b.detach().clone(), float(module.scaling[name])
    return found


def eager_model(base, adapters):
    """A copy of the plain classifier that runs the adapter eagerly."""
    model = copy.deepcopy(base)
    for path, adapter in adapters.items():
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, EagerLora(model.get_submodule(path), *adapter))
    return model


def merged_model(base, adapters, dtype, leaving=None):
    """A copy of the plain classifier with the update in its weights: computed in float64, then cast to ``dtype``.

    ``leaving``: adapters that ``base`` has in its weights, which are taken out in the same step.
    """
    model = copy.deepcopy(base).to(dtype)
    for path, adapter in adapters.items():
        exact = base.get_submodule(path).weight.double() + _update(adapter)
        if leaving is not None:
            exact -= _update(leaving[path])
        model.get_submodule(path).weight.data.copy_(exact)
    return model


def _update(adapter):
    lora_a, lora_b, scaling = adapter
    return scaling * (lora_b.double() @ lora_a.double())


@torch.no_grad()
def encode(model, batch):
    return model.encode(**batch)


def budget(eager, exact):
    """Allowed distance from float64, a row."""
    rounding = torch.finfo(torch.float32).eps * exact.norm(dim=-1)
    return (eager.double() - exact).norm(dim=-1) + rounding


def distance(one, other, allowed):
    """Worst row of ‖one − other‖ / allowed."""
    return ((one.double() - other.double()).norm(dim=-1) / allowed).max().item()


class Oracle:
    """For each adapter (None is the base): the plain model it is compared with, in float64 and in eager torch."""

    def __init__(self, base, adapters):
        self.base = base
        self.adapters = adapters  # name -> {path: (lora_a, lora_b, scaling)}

    def exact(self, name, batch):
        return encode(merged_model(self.base, self.adapters.get(name, {}), torch.float64), batch)

    def budget(self, name, batch):
        return budget(encode(eager_model(self.base, self.adapters.get(name, {})), batch), self.exact(name, batch))

    def merged_budget(self, name, batch, before=None):
        """The budget when the weights themselves were rounded after the merge; ``before``: and after a merge of that
        adapter, from which they were switched."""
        dtype, base, leaving = next(self.base.encoder.parameters()).dtype, self.base, None
        if before is not None:
            leaving = self.adapters[before]
            base = merged_model(base, leaving, dtype)
        rounded = merged_model(base, self.adapters[name], dtype, leaving)
        return budget(encode(rounded, batch), self.exact(name, batch))


def check_mixed(pool, oracle, batch, names):
    """Every row of a batch that names its own adapter against the batch in which all rows take that adapter."""
    worst, worst_exact, same_bits, same_bits_alone = 0.0, 0.0, True, True
    with pool.batch(names):
        mixed = encode(pool.model, batch)
    with use_backend(batch_invariant=True), pool.batch(names):
        mixed_invariant = encode(pool.model, batch)
    for name in dict.fromkeys(names):
        rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=mixed.device)
        sub = {key: value[rows] for key, value in batch.items()}
        allowed = oracle.budget(name, sub)
        with pool.batch([name] * len(names)):
            one = encode(pool.model, batch)[rows]
        worst = max(worst, distance(mixed[rows], one, 2 * allowed))
        worst_exact = max(worst_exact, distance(mixed[rows], oracle.exact(name, sub), 2 * allowed))
        with use_backend(batch_invariant=True):
            with pool.batch([name] * len(names)):
                same_bits &= torch.equal(mixed_invariant[rows], encode(pool.model, batch)[rows])
            with pool.batch([name] * len(rows)):
                same_bits_alone &= torch.equal(mixed_invariant[rows], encode(pool.model, sub))
    return [
        Claim("mixed batch: each row equals its one-adapter run", worst <= 1, f"{worst:.2f} of two budgets"),
        Claim("mixed batch: each row against float64", worst_exact <= 1, f"{worst_exact:.2f} of two budgets"),
        Claim("batch_invariant: the same bits as the one-adapter run", same_bits, "bitwise" if same_bits else "differ"),
        Claim(
            "batch_invariant: the same bits as that adapter's rows alone",
            same_bits_alone,
            "bitwise" if same_bits_alone else "differ",
        ),
    ]


def check_merging(model, oracle, batch, names):
    """Merge, switch, unmerge of a PeftModel that holds the adapters; its weights end as they began."""
    first, second = names[:2]
    classifier = model.get_base_model()
    weights = {path: _weight(classifier, path).clone() for path in oracle.adapters[first]}
    model.set_adapter(first)
    model.merge_adapter()
    merged = distance(encode(classifier, batch), oracle.exact(first, batch), 2 * oracle.merged_budget(first, batch))
    model.base_model.switch_adapter(second)
    allowed = 2 * oracle.merged_budget(second, batch, before=first)
    switched = distance(encode(classifier, batch), oracle.exact(second, batch), allowed)
    model.unmerge_adapter()
    left = max(
        ((_weight(classifier, path) - before).double().norm() / (2 * _rounding(before, oracle, names, path))).item()
        for path, before in weights.items()
    )
    return [
        Claim(f"merge of '{first}': output against float64", merged <= 1, f"{merged:.2f} of two budgets"),
        Claim(f"switch to '{second}': output against float64", switched <= 1, f"{switched:.2f} of two budgets"),
        Claim("unmerge: the weights are back, to within roundings", left <= 1, f"{left:.2f} of the roundings"),
    ]


def _weight(classifier, path):
    return classifier.get_submodule(path).weight.detach()


def _rounding(before, oracle, names, path):
    """What one rounding of the base or of a merged weight can change: the sum over the steps that were taken."""
    total = torch.finfo(before.dtype).eps / 2 * before.double().norm()
    for name in names[:2]:
        exact = before.double() + _update(oracle.adapters[name][path])
        total = total + torch.finfo(before.dtype).eps / 2 * exact.norm()
    return total
