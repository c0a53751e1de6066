"""Adapters of bare parameters (``target_parameters``): every use of a parameter, against peft's ``ParamWrapper``."""

import copy
import subprocess
import sys

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.layers import low_rank as low_rank_file
from lora_kernels.layers import parameter
from lora_kernels.layers.low_rank import LowRank, whole
from lora_kernels.testing import assert_within_budget

from .oracle import close, life, pair, randomize, same
from .parameter_cases import BOTH, EXPERTS, FRUGAL, INNER, OUTER, USES, Experts, Model, x


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("use", USES)
def test_life(use, is_transposed):
    life(lambda: Model(use, is_transposed), (x(),), **BOTH)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["inp"], "target_parameters": ["down"]},
        {"target_modules": None, "target_parameters": ["experts.table"], "use_rslora": True},
        {**BOTH, "rank_pattern": {"experts.up": 1}, "alpha_pattern": {"down": 7}},
        {"target_modules": [], "target_parameters": ["inp.weight"]},
    ],
)
def test_other_targets_and_patterns(config):
    life(Model, (x(),), **config)


def test_small_parameters_are_updated_whole(monkeypatch):
    monkeypatch.undo()
    assert Model().experts.up.numel() < parameter.SMALL
    life(Model, (x(),), **BOTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_half_precision(use, dtype, autocast_adapter_dtype):
    torch.manual_seed(0)
    base = Model(use).to(dtype)
    ours, theirs = (
        module.get_peft_model(
            copy.deepcopy(base), module.LoraConfig(**BOTH), autocast_adapter_dtype=autocast_adapter_dtype
        )
        for module in (lk, peft)
    )
    randomize(theirs, scale=0.3)
    ours.load_state_dict(theirs.state_dict())
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            same(ours, theirs, (x().to(dtype),))


def test_autocast():
    ours, theirs = pair(Model, **BOTH)
    exact = copy.deepcopy(theirs).double()(x().double())
    with torch.autocast("cpu", torch.bfloat16):
        y, z = ours(x()), theirs(x())
    assert y.dtype == z.dtype == torch.bfloat16
    assert_within_budget(y, z, exact, "autocast", magnitude=exact.abs())


# What is not built


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is written in this context."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        views = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor) and type(t) is not LowRank}
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in views:
                self.size = max(self.size, tensor.numel())
        return result


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("use", USES)
def test_the_updated_stack_is_not_built(use, is_transposed, monkeypatch):
    built = []

    def counted(weight, terms):
        built.append(weight.numel())
        return whole(weight, terms)

    monkeypatch.setattr(low_rank_file, "whole", counted)
    ours, theirs = pair(lambda: Model(use, is_transposed), **BOTH)
    plain = copy.deepcopy(ours).unload()
    one, sizes = INNER * OUTER, []
    for model in (ours, theirs, plain):
        with Largest() as largest:
            model(x(2).requires_grad_()).sum().backward()
        sizes.append(largest.size)
    assert sizes[1] >= EXPERTS * one
    if use in FRUGAL:
        assert not built
        assert sizes[0] <= max(sizes[2], one)  # of the module's own making: the experts of all rows, a copy for einsum
    else:
        assert built == [EXPERTS * one] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_of_a_step():
    code = """
import re, torch
from torch.nn import functional as F
import lora_kernels as package

class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.zeros(64, 512, 512))  # 64 MiB

    def forward(self, x):
        return sum(F.linear(x, self.up[e]) for e in (1, 5, 60))

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

def step(model):
    model(torch.ones(4, 512, requires_grad=True)).sum().backward()

config = package.LoraConfig(target_modules=[], target_parameters=["up"], r=4)
model = package.get_peft_model(torch.nn.Sequential(Experts()), config)
step(package.get_peft_model(torch.nn.Sequential(torch.nn.Linear(512, 512)), package.LoraConfig(target_modules=["0"])))
before = peak()
step(model)
print(peak() - before)
""".replace("\\\\", "\\")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 24  # MiB; the stack has 64, a matrix 1, the factors 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Checkpointed(Model):
        def forward(self, x):
            return checkpoint(self.experts, self.inp(x), use_reentrant=reentrant)

    config = {"target_modules": ["inp"], "target_parameters": ["up", "down"]}
    ours, _ = pair(Checkpointed, **config)
    plain, _ = pair(Model, **config)
    for model in (ours, plain):
        model(x()).square().sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


def test_compiled_without_a_break():
    ours, _ = pair(lambda: Model("all_experts"), **BOTH)
    # torch 2.11 cannot trace the removal of an entry of an instance's __dict__: it breaks there.
    whole = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=whole)
    y = compiled(x())
    close(y, ours(x()).double())
    y.sum().backward()
    found = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    ours(x()).sum().backward()
    assert len(found) == 4
    for name, gradient in found.items():
        close(gradient, ours.get_parameter(name).grad.double())


def test_a_module_that_calls_itself_and_an_error_leave_nothing_behind():
    class Twice(Experts):
        def __init__(self, use):
            super().__init__(use)
            self.depth = 0

        def forward(self, x):
            self.depth += 1
            try:
                if self.depth == 1:
                    return super().forward(self(x)) if x.isfinite().all() else 1 / 0
                return super().forward(x)
            finally:
                self.depth -= 1

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Twice("by_expert")

        def forward(self, x):
            return self.experts(x[:, [0, 1, 2, 3, 4, 0]])

    ours, theirs = pair(Both, **BOTH)
    owner = ours.base_model.model.experts.get_base_layer()
    plain = dict(owner.__dict__)
    for small in (0, 2**16):
        parameter.SMALL = small
        close(ours(x()), theirs(x()).double())
        with pytest.raises(ZeroDivisionError):
            ours(x() / 0)
    assert owner.__dict__ == plain
