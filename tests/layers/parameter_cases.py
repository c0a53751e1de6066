"""Modules with bare parameters, which are used in every way that their adapters have to stand."""

import torch
from torch import nn
from torch.nn import functional as F

EXPERTS, INNER, OUTER = 3, 10, 6


def routed(x):
    """Which expert each row goes to."""
    return torch.arange(len(x)) % EXPERTS


class Experts(nn.Module):
    """Two stacks, (experts, out, in) or ``is_transposed``: (experts, in, out); ``use`` is how they are used."""

    def __init__(self, use, is_transposed=False):
        super().__init__()
        self.use, self.is_transposed = use, is_transposed
        first, second = (INNER, OUTER), (OUTER, INNER)
        shapes = (second, first) if is_transposed else (first, second)
        self.up, self.down = (nn.Parameter(torch.randn(EXPERTS, *shape) / 3) for shape in shapes)
        self.table = nn.Parameter(torch.randn(EXPERTS, OUTER))

    def forward(self, x):
        h = torch.tanh(USES[self.use](self, x, self.up) + 0.1 * self.table.sum())
        return USES[self.use](self, h, self.down)


def by_expert(module, x, weight):
    rows = []
    for e in routed(x):
        matrix = weight[e]
        rows.append(x[[len(rows)]] @ matrix if module.is_transposed else F.linear(x[[len(rows)]], matrix))
    return torch.cat(rows)


def by_gather(module, x, weight):
    chosen = weight[routed(x)]
    if module.is_transposed:
        return torch.bmm(x.unsqueeze(1), chosen).squeeze(1)
    return torch.bmm(chosen, x.unsqueeze(-1)).squeeze(-1)


def by_group(module, x, weight):
    order = routed(x).argsort(stable=True)
    ends = torch.bincount(routed(x), minlength=EXPERTS).cumsum(0).int()
    stack = weight if module.is_transposed else weight.transpose(-2, -1)
    start, rows = 0, []
    for e, end in enumerate(ends):
        rows.append(torch.mm(x[order][start:end], stack[e]))
        start = end
    return torch.cat(rows)[order.argsort()]


def all_experts(module, x, weight):
    stack = weight if module.is_transposed else weight.mT
    return torch.matmul(x.expand(EXPERTS, *x.shape), stack).mean(0)


def by_einsum(module, x, weight):
    return torch.einsum("bi,eio->beo" if module.is_transposed else "bi,eoi->beo", x, weight).sum(1)


def by_halves(module, x, weight):
    halves = weight.chunk(2, dim=-1 if module.is_transposed else 1)
    return torch.cat([by_expert(module, x, half) for half in halves], -1)


def arbitrarily(module, x, weight):
    matrix = (weight * torch.linspace(1, 2, EXPERTS, dtype=weight.dtype).view(-1, 1, 1)).sum(0)
    return x @ (matrix if module.is_transposed else matrix.t())


class ByHand(torch.autograd.Function):
    """An autograd function of the module's own, which takes the parameter for a tensor."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.mT, x.mT @ grad


def by_function(module, x, weight):
    return ByHand.apply(x.expand(EXPERTS, *x.shape), weight if module.is_transposed else weight.mT).sum(0)


USES = {
    f.__name__: f for f in (by_expert, by_gather, by_group, all_experts, by_einsum, by_halves, arbitrarily, by_function)
}
FRUGAL = [name for name in USES if name != "arbitrarily"]


class Model(nn.Module):
    def __init__(self, use="by_expert", is_transposed=False):
        super().__init__()
        self.inp = nn.Linear(5, OUTER)
        self.experts = Experts(use, is_transposed)

    def forward(self, x):
        return self.experts(self.inp(x))


def x(rows=7):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(5))


BOTH = {"target_modules": [], "target_parameters": ["experts.up", "down"], "r": 2, "lora_alpha": 3}
