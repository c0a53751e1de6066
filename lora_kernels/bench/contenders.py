"""Who is timed: the base alone, the in-place ``addmm_`` form, PEFT where installed, and ours; on the same data.

Weights rotate: every call takes the next of several copies, together larger than the last-level cache, so that no
contender finds the weight there because another one, or its own last call, left it.
"""

import contextlib
import importlib.util
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..layers import LoraLinear
from ..ops import library

CACHE_BYTES = 96 << 20  # three times the last-level cache of a large server slice
MAX_COPIES = 16
PEFT_INSTALLED = importlib.util.find_spec("peft") is not None


class Inputs:
    """The tensors of a case, seeded."""

    def __init__(self, case, device):
        in_features, out_features = case.sizes
        dtype = getattr(torch, case.dtype)
        adapter_dtype = getattr(torch, case.adapter_dtype or case.dtype)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape, std, dtype=dtype):
            return torch.randn(*shape, generator=generator, device=device).mul_(std).to(dtype)

        self.case, self.device = case, device
        self.x = normal(max(case.num_tokens, 1), in_features, std=1.0)
        self.dy = normal(max(case.num_tokens, 1), out_features, std=1.0)
        weight = normal(out_features, in_features, std=in_features**-0.5)
        copies = math.ceil(CACHE_BYTES / (weight.numel() * weight.element_size()))
        self.weights = [weight.clone() for _ in range(min(max(copies, 2), MAX_COPIES))]
        count = {"multi": case.adapters, "switch": 2, "switch_exact": 2}.get(case.op, 1)
        widths = case.widths if case.op == "grouped" else [out_features] * count  # of each adapter
        self.lora_a = [normal(case.rank, in_features, std=in_features**-0.5, dtype=adapter_dtype) for _ in widths]
        self.lora_b = [normal(width, case.rank, std=0.01, dtype=adapter_dtype) for width in widths]
        self.scaling = torch.tensor(1.0, device=device)
        self.target = torch.empty_like(weight)
        self._next = itertools.cycle(range(len(self.weights)))

    def next(self, items=None):
        """The next copy of the weight (or of what was made for each copy); the turn is shared by all contenders."""
        return (self.weights if items is None else items)[next(self._next)]

    def copy(self):
        """One reading and one writing of as many bytes as the weight has."""
        return self.target.copy_(self.next())


@contextlib.contextmanager
def contenders(case, device="cpu", only=None):
    """{name: function} of the case, within the right grad mode; ``only``: names to keep."""
    inputs = Inputs(case, device)
    with torch.inference_mode(case.op in ("forward", "gemm", "dx", "multi", "grouped", "overhead")):
        runs = _MAKERS[case.op](inputs)
        yield {name: run for name, run in runs.items() if only is None or name in only}


def _forward(inputs):
    x, scaling, (a,), (b,) = inputs.x, inputs.scaling, inputs.lora_a, inputs.lora_b
    runs = {
        "base": lambda: F.linear(x, inputs.next()),
        "addmm_": lambda: _addmm(F.linear(x, inputs.next()), x, a, b),
        "ours": lambda: ops.lora_linear(x, inputs.next(), None, a, b, scaling),
    }
    if PEFT_INSTALLED:
        layers = _peft_layers(inputs)
        runs["peft"] = lambda: inputs.next(layers)(x)
    return runs


def _gemm(inputs):
    """The product of our kernels with no adapter, which no public function asks for."""
    x, run = inputs.x, library.op("lora_linear")
    none = x.new_empty((0, x.shape[1])), x.new_empty((inputs.weights[0].shape[0], 0))
    return {
        "base": lambda: F.linear(x, inputs.next()),
        "ours": lambda: run(x, inputs.next(), None, *none, inputs.scaling, None, False),
    }


def _dx(inputs):
    """The gradient of x alone."""
    dy, x, (a,), (b,) = inputs.dy, inputs.x, inputs.lora_a, inputs.lora_b
    run, h = library.op("lora_linear_backward"), torch.empty((dy.shape[0], a.shape[0]), device=inputs.device)
    rest = (inputs.scaling, h, h.new_empty(0, dtype=torch.uint8), 0.0, None, True, False, False, False)
    return {
        "base": lambda: dy @ inputs.next(),
        "addmm_": lambda: (dy @ inputs.next()).addmm_(dy @ b, a),
        "ours": lambda: run(dy, x, inputs.next(), a, b, *rest)[0],
    }


def _multi(inputs):
    x, count = inputs.x, inputs.case.adapters
    slots = torch.arange(x.shape[0], dtype=torch.int32, device=inputs.device) % count
    plan = ops.plan_batch(slots, num_slots=count)
    banks = (torch.stack(inputs.lora_a), torch.stack(inputs.lora_b), torch.ones(count, device=inputs.device))

    def addmm():
        y = F.linear(x, inputs.next())
        for row, (a, b) in enumerate(zip(inputs.lora_a, inputs.lora_b, strict=True)):
            _addmm(y[row::count], x[row::count], a, b)
        return y

    runs = {
        "base": lambda: F.linear(x, inputs.next()),
        "addmm_": addmm,
        "ours": lambda: ops.multi_lora_linear(x, inputs.next(), None, *banks, plan),
        "copy_": inputs.copy,
    }
    if PEFT_INSTALLED:
        layers, names = _peft_layers(inputs), [f"a{slot}" for slot in slots.tolist()]
        runs["peft"] = lambda: inputs.next(layers)(x, adapter_names=names)
    return runs


def _grouped(inputs):
    """Projections that read the same x, an adapter each; the rows of a weight are those of all projections."""
    x, a, b = inputs.x, inputs.lora_a, inputs.lora_b
    copies = [weight.split(inputs.case.widths) for weight in inputs.weights]
    no_bias, scalings = [None] * len(a), [inputs.scaling] * len(a)

    def addmm():
        parts = zip(inputs.next(copies), a, b, strict=True)
        return [_addmm(F.linear(x, weight), x, lora_a, lora_b) for weight, lora_a, lora_b in parts]

    runs = {
        "base": lambda: [F.linear(x, weight) for weight in inputs.next(copies)],
        "addmm_": addmm,
        "ours": lambda: list(ops.grouped_lora_linear(x, inputs.next(copies), no_bias, a, b, scalings)),
    }
    if PEFT_INSTALLED:
        each = [_peft_layers(inputs, *one) for one in zip(zip(*copies, strict=True), zip(a), zip(b), strict=True)]
        layers = list(zip(*each, strict=True))
        runs["peft"] = lambda: [layer(x) for layer in inputs.next(layers)]
    return runs


def _merge(inputs):
    """One direction at a time; the weights drift by so little that it changes no time."""
    sign = 1 if inputs.case.op == "merge" else -1
    scaling, (a,), (b,) = inputs.scaling, inputs.lora_a, inputs.lora_b
    run, dtype = ops.merge_ if sign > 0 else ops.unmerge_, inputs.weights[0].dtype
    runs = {
        "base": inputs.copy,
        "addmm_": lambda: inputs.next().addmm_(b.to(dtype), a.to(dtype), alpha=sign),
        "ours": lambda: run(inputs.next(), a, b, scaling),
    }
    if PEFT_INSTALLED:
        layers = _peft_layers(inputs)

        def peft():
            layer = inputs.next(layers)
            # the state is set by hand: only one direction is to be timed
            layer.merged_adapters = [] if sign > 0 else ["a0"]
            layer.merge() if sign > 0 else layer.unmerge()

        runs["peft"] = peft
    return runs


def _switch(inputs):
    """From adapter 0 to adapter 1; the base is one merge of both ranks together."""
    (a0, a1), (b0, b1) = inputs.lora_a, inputs.lora_b
    both_a, both_b = torch.cat([a0, a1]), torch.cat([b0, b1], dim=1)
    dtype = inputs.weights[0].dtype
    scaling = inputs.scaling

    def addmm():
        weight = inputs.next()
        weight.addmm_(b0.to(dtype), a0.to(dtype), alpha=-1)
        weight.addmm_(b1.to(dtype), a1.to(dtype))

    runs = {
        "base": lambda: ops.merge_(inputs.next(), both_a, both_b, scaling),
        "addmm_": addmm,
        "ours": lambda: ops.switch_(inputs.next(), (a0, b0, scaling), (a1, b1, scaling)),
        "copy_": inputs.copy,
    }
    if PEFT_INSTALLED:
        layers = _peft_layers(inputs)

        def peft():
            layer = inputs.next(layers)
            layer.merged_adapters = ["a0"]
            layer.unmerge()
            layer.set_adapter("a1")
            layer.merge()

        runs["peft"] = peft
    return runs


def _exact(inputs):
    """Merged and unmerged again, every bit as before; the base copies there and back."""
    scaling, (a,), (b,) = inputs.scaling, inputs.lora_a, inputs.lora_b

    def copies():
        weight = inputs.next()
        weight.copy_(inputs.target.copy_(weight))

    def ours():
        weight = inputs.next()
        residual = ops.merge_exact_(weight, a, b, scaling)
        ops.unmerge_exact_(weight, a, b, scaling, residual)

    return {"base": copies, "ours": ours}


def _switch_exact(inputs):
    """From one adapter to the other and, the next time, back."""
    adapters = [(a, b, inputs.scaling) for a, b in zip(inputs.lora_a, inputs.lora_b, strict=True)]
    states = [[weight, None, *adapters] for weight in inputs.weights]

    def ours():
        state = inputs.next(states)
        weight, residual, old, new = state
        if residual is None:
            residual = ops.merge_exact_(weight, *old)
        state[1:] = ops.switch_exact_(weight, old, new, residual), new, old

    return {"base": inputs.copy, "ours": ours}


def _train(inputs):
    """Forward and backward of one layer: gradients of x and, but for the base, of A and B."""
    case, scaling = inputs.case, inputs.scaling
    x = inputs.x.requires_grad_()
    a, b = inputs.lora_a[0].requires_grad_(), inputs.lora_b[0].requires_grad_()

    def step(forward, *leaves):
        def run():
            torch.autograd.grad(forward(), (x, *leaves), inputs.dy)

        return run

    def addmm():
        dropped = F.dropout(x, case.dropout) if case.dropout else x
        return _addmm(F.linear(x, inputs.next()), dropped, a, b)

    def ours():
        return ops.lora_linear(x, inputs.next(), None, a, b, scaling, dropout_p=case.dropout)

    runs = {
        "base": step(lambda: F.linear(x, inputs.next())),
        "addmm_": step(addmm, a, b),
        "ours": step(ours, a, b),
    }
    if PEFT_INSTALLED:
        layers = _peft_layers(inputs)

        def peft():
            layer = inputs.next(layers)
            leaves = layer.lora_A["a0"].weight, layer.lora_B["a0"].weight
            torch.autograd.grad(layer(x), (x, *leaves), inputs.dy)

        runs["peft"] = peft
    return runs


def _overhead(inputs):
    """What a layer costs on a tensor that is no work at all."""
    weight, x = inputs.weights[0], inputs.x
    base = _linear(weight)
    layer = LoraLinear.from_linear(_linear(weight), r=inputs.case.rank, autocast_adapter_dtype=False).eval()
    runs = {"base": lambda: base(x), "ours": lambda: layer(x)}
    if PEFT_INSTALLED:
        peft = _peft_layers(inputs)[0].eval()
        runs["peft"] = lambda: peft(x)
    return runs


def _addmm(y, x, lora_a, lora_b):
    """y += x Aᵀ Bᵀ in place: what careful plain torch does."""
    return y.addmm_((x.to(lora_a.dtype) @ lora_a.t()).to(y.dtype), lora_b.t().to(y.dtype))


def _linear(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _peft_layers(inputs, weights=None, lora_a=None, lora_b=None):
    """PEFT's layer over each copy of the weight, with the same adapters "a0", "a1", ...; by default those of inputs."""
    import peft

    case, weights = inputs.case, weights or inputs.weights
    lora_a, lora_b = lora_a or inputs.lora_a, lora_b or inputs.lora_b
    options = {"r": case.rank, "lora_alpha": case.rank, "target_modules": ["0"], "lora_dropout": case.dropout}
    layers = []
    for weight in weights:
        model = peft.get_peft_model(
            nn.Sequential(_linear(weight)), peft.LoraConfig(**options), "a0", autocast_adapter_dtype=False
        )
        for index in range(1, len(lora_a)):
            model.add_adapter(f"a{index}", peft.LoraConfig(**options))
        layer = model.base_model.model[0]
        for index, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
            for factor, value in ((layer.lora_A, a), (layer.lora_B, b)):
                factor[f"a{index}"].weight = nn.Parameter(value.detach().clone())
        layers.append(layer.train(case.op == "train"))
    return layers


_MAKERS = {
    "forward": _forward,
    "gemm": _gemm,
    "dx": _dx,
    "multi": _multi,
    "grouped": _grouped,
    "merge": _merge,
    "unmerge": _merge,
    "switch": _switch,
    "exact": _exact,
    "switch_exact": _switch_exact,
    "train": _train,
    "overhead": _overhead,
}
