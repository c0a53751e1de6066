"""Adapters of bare parameters (``target_parameters``): every use of a parameter, against peft's ``ParamWrapper``."""

import copy
import re
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.layers import LoraParameter, parameter
from lora_kernels.layers import low_rank as low_rank_file
from lora_kernels.layers.low_rank import LowRank, low_rank, whole
from lora_kernels.testing import assert_within_budget

from .oracle import checkpoints, close, gradients, life, pair, randomize, same

EXPERTS, INNER, OUTER = 3, 10, 6


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(parameter, "SMALL", 0)


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


# What reaches the parts of a tensor that is never built


def parts(grad=True):
    generator = torch.Generator().manual_seed(0)
    weight, *factors = (torch.randn(shape, generator=generator) for shape in ((4, 6, 8), (4, 6, 3), (4, 3, 8)))
    return weight, [factor.requires_grad_(grad) for factor in factors]


ASKED = {
    "int": lambda w: w[-1],
    "0-d": lambda w: w[torch.tensor(2)],
    "uint8": lambda w: w[torch.tensor(2, dtype=torch.uint8)],
    "mask": lambda w: w[torch.tensor([True, False, True, False])],
    "indices": lambda w: w[torch.tensor([3, 3, 0])],
    "2-d indices": lambda w: w[torch.tensor([[3, 3], [0, 1]])],
    "list": lambda w: w[[2, 1]],
    "experts": lambda w: w[1:3],
    "columns": lambda w: w[:, :, ::3],
    "rows of one": lambda w: w[2, 1:4],
    "an element": lambda w: w[2, 1, 4],
    "a row of all": lambda w: w[:, 1],
    "None": lambda w: w[None, 1],
    "ellipsis": lambda w: w[..., 2],
    "True": lambda w: w[True],
    "split": lambda w: w.split([2, 4], dim=1)[1],
    "chunk": lambda w: torch.chunk(w, 2, -1)[0],
    "chunk of experts": lambda w: w.chunk(2)[1],
    "permute": lambda w: w.permute(0, 2, 1),
    "permute others": lambda w: w.permute((1, 0, 2)),
    "transpose others": lambda w: w.transpose(0, 1),
    "iteration": lambda w: list(w)[3],
    "unbind": lambda w: torch.unbind(w)[0],
    "unbind rows": lambda w: w.unbind(1)[0],
    "cast": lambda w: w.double(),
    "to": lambda w: w.to("cpu", torch.float64)[1],
    "contiguous": lambda w: w.mT.contiguous(),
    "matrix": lambda w: w[1].t(),
    "T": lambda w: w[1].T[:, 2:],
    "rows": lambda w: w[0][torch.tensor([1, 1])],
    "embedding": lambda w: F.embedding(torch.tensor([[1, 5]]), w[0]),
    "addmm": lambda w: torch.addmm(torch.ones(8), torch.ones(2, 6), w[3]),
    "baddbmm": lambda w: torch.baddbmm(torch.ones(4, 2, 8), torch.ones(4, 2, 6), w),
    "from the left": lambda w: w @ torch.linspace(0, 1, 8).view(8, 1),
    "vector": lambda w: w @ torch.linspace(0, 1, 8),
    "row vector": lambda w: torch.linspace(0, 1, 6) @ w,
    "3-d rows": lambda w: F.linear(torch.ones(2, 3, 8), w[2], torch.ones(6)),
    "itself": lambda w: w @ w.mT,
    "grouped": lambda w: torch.nn.functional.grouped_mm(
        torch.linspace(-1, 1, 48).view(6, 8), w.mT[:, :, :4], offs=torch.tensor([1, 1, 4, 6], dtype=torch.int32)
    ),
    "einsum": lambda w: torch.einsum("ti,eoi->teo", torch.linspace(-1, 1, 16).view(2, 8), w),
    "einsum second": lambda w: torch.einsum("eoi, ei -> eo", [w, torch.linspace(-1, 1, 32).view(4, 8)]),
    "einsum trace": lambda w: torch.einsum("eii->e", w[:, :, :6]),
    "written to": lambda w: (w[1].mul_(2), w[1])[0],
    "function": lambda w: ByHand.apply(torch.ones(4, 2, 6), w),
    "arithmetic": lambda w: 2 - w / 3,
    "numbers": lambda w: torch.tensor(w[1].detach().tolist()) + 0 * w[1],
}


@pytest.mark.parametrize("asked", ASKED)
def test_anything_asked_of_it_is_what_the_sum_gives(asked):
    ask = ASKED[asked]
    results = []
    for low in (False, True):
        weight, (left, right) = parts()
        whole = low_rank(weight, [(left, right, 0.5), (-left, right, 0.25)]) if low else weight + left @ right * 0.25
        assert len(whole) == 4
        assert whole.shape == weight.shape
        assert whole.requires_grad
        y = ask(whole)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        with torch.no_grad():
            again = ask(low_rank(weight, [(left, right, 0.25)]) if low else weight + left @ right * 0.25)
        results.append((y, again, left.grad, right.grad))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        close((found * 1).float(), expected.double(), torch.full((), 8.0))


def test_a_foreign_kernel_gets_an_error_and_no_address():
    weight, (left, right) = parts(grad=False)
    low = low_rank(weight, [(left, right, 1.0)])
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="data pointer"):
        low.data_ptr()


# Checkpoints, several adapters, errors


@pytest.mark.parametrize(
    "config",
    [BOTH, {"target_modules": ["inp"], "target_parameters": ["up"], "r": 3}, {**BOTH, "rank_pattern": {"down": 5}}],
)
def test_checkpoints_both_ways(tmp_path, config):
    checkpoints(Model, (x(),), tmp_path, **config)


class Mixed(Experts):
    """Experts that hold a linear layer."""

    def __init__(self):
        super().__init__("by_expert")
        self.mix = nn.Linear(OUTER, OUTER)

    def forward(self, x):
        return super().forward(self.mix(x))


class Block(nn.Module):
    """A parameter beside a module with parameters."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(OUTER, OUTER))
        self.experts = Mixed()

    def forward(self, x):
        return self.experts(x @ self.gain)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(5, OUTER)
        self.block = Block()

    def forward(self, x):
        return self.block(self.inp(x))


INSIDE = {"target_modules": ["mix"], "target_parameters": ["experts.up", "experts.down"]}


def test_a_layer_inside_of_a_module_with_adapted_parameters(tmp_path):
    ours, theirs = pair(Nested, **INSIDE)
    same(ours, theirs, (x(),))
    gradients(ours, theirs, (x(),))
    checkpoints(Nested, (x(),), tmp_path, **INSIDE)
    torch.manual_seed(0)
    loaded = lk.PeftModel.from_pretrained(Nested(), str(tmp_path / "theirs")).eval()
    loaded.load_adapter(str(tmp_path / "ours"), "other")  # the names are those of the wrapped module now
    before = loaded(x())
    loaded.set_adapter("other")
    assert torch.equal(loaded(x()), before)
    for package, model in ((lk, ours), (peft, theirs)):
        model.add_adapter("b", package.LoraConfig(**INSIDE))
        mix = model.get_submodule("base_model.model.block.experts.base_layer.base_layer.mix")
        assert ("b" in mix.lora_A) is (package is lk)  # which peft does not look into again


def test_parameters_inside_of_a_module_with_an_adapted_parameter(tmp_path):
    config = {"target_modules": ["mix"], "target_parameters": ["gain", "up", "down"]}
    with pytest.raises(AttributeError):
        peft.get_peft_model(Nested(), peft.LoraConfig(**config))
    torch.manual_seed(0)
    ours = randomize(lk.get_peft_model(Nested(), lk.LoraConfig(**config))).eval()
    assert [type(m).__name__ for m in ours.base_model.layers()] == ["LoraParameter"] * 3 + ["LoraLinear"]
    y = ours(x())
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    twin = lk.PeftModel.from_pretrained(Nested(), str(tmp_path)).eval()
    assert torch.equal(twin(x()), y)
    whole = twin.merge_and_unload()
    close(whole(x()), y.double())
    assert list(whole.state_dict()) == list(Nested().state_dict())


def test_adapters_load_in_any_order(tmp_path):
    ours, theirs = pair(Model, ("default", "other"), **BOTH)
    expected = {}
    for name in ("default", "other"):
        theirs.set_adapter(name)
        expected[name] = theirs(x())
    for side, model, package in (("ours", ours, peft), ("theirs", theirs, lk)):
        model.save_pretrained(tmp_path / side)
        torch.manual_seed(0)
        loaded = package.PeftModel.from_pretrained(Model(), str(tmp_path / side / "other"), "other").eval()
        result = loaded.load_adapter(str(tmp_path / side), "default")
        assert not result.unexpected_keys
        assert not [key for key in result.missing_keys if ".other." not in key]
        for name, y in expected.items():
            loaded.set_adapter(name)
            close(loaded(x()), y.double())


def each(call):
    """``call(package)`` for both: results, or errors of one class with one message up to its end."""
    found = []
    for package in (peft, lk):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found.append(call(package))
            except Exception as error:
                found.append(error)
    theirs, ours = found
    assert isinstance(theirs, Exception) == isinstance(ours, Exception), found
    if isinstance(theirs, Exception):
        assert type(theirs).__name__ == type(ours).__name__
        assert str(ours).startswith(re.split(r"[.;]|Make sure", str(theirs))[0]), found
    return found


@pytest.mark.parametrize(
    "change",
    [
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"target_parameters": ["nothing"]},
        {"target_parameters": []},
        {"target_parameters": "down"},
        {"target_parameters": ["inp.bias"]},
        {"target_modules": ["inp"], "target_parameters": ["inp.weight"]},
    ],
)
def test_what_peft_refuses_is_refused_and_leaves_the_model(change):
    models = {}

    def call(package):
        models[package] = Model()
        return package.get_peft_model(models[package], package.LoraConfig(**{**BOTH, **change}))

    assert isinstance(each(call)[1], Exception)
    if lk in models:
        assert not any("lora" in name for name, _ in models[lk].named_modules())
        assert all(p.requires_grad for p in models[lk].parameters())


def test_other_refusals():
    class Top(nn.Module):
        def __init__(self):
            super().__init__()
            self.param = nn.Parameter(torch.zeros(4, 4))

    each(lambda package: package.get_peft_model(Top(), package.LoraConfig(target_parameters=["param"])))
    models = {}

    def second(package):
        models[package] = package.get_peft_model(Model(), package.LoraConfig(**BOTH))
        models[package].add_adapter("b", package.LoraConfig(target_parameters=["experts.up"], target_modules=[]))

    each(second)
    assert list(models[lk].peft_config) == ["default"]
    for names in (["default", "__base__"], ["default", "unknown"]):
        each(lambda package, names=names: models[package].eval()(x(2), adapter_names=names))
    each(lambda package: models[package].add_weighted_adapter(["default"], [1.0], "c"))
    for package in (peft, lk):
        with pytest.raises((ValueError, AttributeError)):
            package.get_peft_model(Model(), package.LoraConfig(**BOTH, init_lora_weights="pissa"))
        with pytest.raises(TypeError, match="modules_to_save"):
            package.get_peft_model(Model(), package.LoraConfig(**BOTH, modules_to_save=["experts"]))
        state = dict(models[package].state_dict())
        with pytest.raises(ValueError, match="target_parameters"):
            package.inject_adapter_in_model(package.LoraConfig(**BOTH), Model(), state_dict=state)
    whole = Model()
    whole.experts.up = nn.Parameter(torch.zeros(3, 10, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="int8"):
        lk.get_peft_model(whole, lk.LoraConfig(**BOTH))


def test_a_name_that_matches_nothing_warns_and_the_closest_are_named():
    with pytest.warns(RuntimeWarning, match=r"\['dwon'\] matched nothing.*down"):
        lk.get_peft_model(Model(), lk.LoraConfig(target_modules=[], target_parameters=["dwon", "up"]))
    with pytest.raises(lk.NoMatchingPeftModuleError, match=r"experts\.down"):
        lk.get_peft_model(Model(), lk.LoraConfig(target_modules=[], target_parameters=["expert.dwon"]))


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "olora", "orthogonal", "pissa_niter_3"])
def test_initial_values(init):
    config = {"target_parameters": ["inp.weight"], "target_modules": [], "init_lora_weights": init, "r": 2}
    base = Model()
    plain = base(x())
    models = []
    for package in (lk, peft):
        torch.manual_seed(1)
        models.append(package.get_peft_model(copy.deepcopy(base), package.LoraConfig(**config)))
    ours, theirs = (model.base_model.model.inp for model in models)
    close(ours.get_base_layer().weight, theirs.get_base_layer().weight.double())
    close(ours.get_delta_weight("default"), theirs.get_delta_weight("default").double(), torch.ones(()))
    if init != "orthogonal":
        close(models[0](x()), plain.double())
    if init in (True, "gaussian"):
        assert torch.equal(ours.lora_A["default"].weight, theirs.lora_A["default"].weight)


# Status, moves, merging


def test_tree_statuses_and_moves():
    ours, theirs = pair(Model, ("default", "b"), **BOTH)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours.base_model.model).replace("LoraLinear", "Linear") == repr(theirs.base_model.model)
    for a, b in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
        assert vars(a) == vars(b)
    assert vars(ours.get_model_status()) == vars(theirs.get_model_status())
    layer, other = (model.base_model.model.experts for model in (ours, theirs))
    assert isinstance(layer, LoraParameter)
    assert lk.tuners.lora.layer.ParamWrapper is LoraParameter
    for name in ("parameter_name", "num_experts", "in_features", "out_features", "r", "scaling", "merged_adapters"):
        assert getattr(layer, name) == getattr(other, name), name
    assert layer.get_param() is layer.get_base_layer().down
    for name in ("default", "b"):
        close(layer.get_delta_weight(name), other.get_delta_weight(name).double())
    a, b = (p.get_peft_model_state_dict(m, adapter_name="b") for p, m in ((lk, ours), (peft, theirs)))
    assert sorted(a) == sorted(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
    fresh = lk.get_peft_model(copy.deepcopy(Model()), lk.LoraConfig(**BOTH), "b").eval()
    lk.set_peft_model_state_dict(fresh, b, "b")
    close(fresh.base_model.model.experts.get_delta_weight("b"), other.get_delta_weight("b").double())
    for model in (ours, theirs):
        model.to(torch.bfloat16)
    same(ours, theirs, (x().bfloat16(),))
    meta = lk.get_peft_model(Model(), lk.LoraConfig(**BOTH), low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in meta.named_parameters() if "lora_" in n)
    lk.set_peft_model_state_dict(meta, a, "default")
    assert not any(p.is_meta for p in meta.parameters())


def test_injection_without_a_peft_model():
    model, other = Model(), Model()
    other.load_state_dict(model.state_dict())
    model = randomize(lk.inject_adapter_in_model(lk.LoraConfig(**BOTH), model))
    other = randomize(peft.inject_adapter_in_model(peft.LoraConfig(**BOTH), other))
    assert list(model.state_dict()) == list(other.state_dict())
    same(model, other, (x(),))


def test_exact_merging_where_there_is_one_matrix_and_refusal_where_there_are_several():
    ours, _ = pair(Model, target_modules=[], target_parameters=["inp.weight"])
    weight = ours.base_model.model.inp.get_param()
    before, y = weight.detach().clone(), ours(x())
    ours.merge_adapter(exact=True)
    assert not torch.equal(weight, before)
    close(ours(x()), y.double())
    ours.unmerge_adapter()
    assert torch.equal(weight, before)
    ours, _ = pair(Model, **BOTH)
    with pytest.raises(ValueError, match="stack of matrices"):
        ours.merge_adapter(exact=True)
    assert not ours.base_model.layers()[0].merged
    with torch.no_grad():
        ours.base_model.model.experts.lora_A["default"].weight[0] = float("nan")
    before = ours.base_model.model.experts.base_layer.get_param().detach().clone()
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
        ours.merge_and_unload(safe_merge=True)
    assert torch.equal(ours.base_model.model.experts.base_layer.get_param(), before)


class PlusOne(nn.Module):
    def forward(self, x):
        return x + 1


def computed(name):
    model = Model()
    owner, _, parameter_name = name.rpartition(".")
    parametrize.register_parametrization(model.get_submodule(owner), parameter_name, PlusOne())
    return model


def test_a_matrix_that_is_computed_already():
    ours, theirs = pair(lambda: computed("inp.weight"), target_modules=[], target_parameters=["inp.weight"])
    same(ours, theirs, (x(),))
    gradients(ours, theirs, (x(),))
    y, before = ours(x()), theirs(x())
    theirs.merge_adapter()
    assert (theirs(x()) - before).norm() > 0.05 * before.norm()  # what was merged is lost
    with pytest.raises(ValueError, match="computed"):
        ours.merge_adapter()
    assert torch.equal(ours(x()), y)
    torch.manual_seed(0)
    assert torch.equal(ours.unload()(x()), computed("inp.weight")(x()))


def test_a_stack_that_is_computed_already():
    ours, theirs = pair(lambda: computed("experts.down"), target_modules=[], target_parameters=["experts.down"])
    plain = copy.deepcopy(ours).unload()
    with torch.no_grad():
        plain.experts.parametrizations.down.original += ours.base_model.model.experts.get_delta_weight("default")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            once, again = theirs(x()), theirs(x())
    assert (again - once).norm() > 0.01 * once.norm()  # peft leaves a copy of the update behind at each call
    for _ in range(2):
        close(ours(x()), plain(x()).double())
    assert len(ours.base_model.model.experts.base_layer.parametrizations.down) == 1


def test_one_expert_stored_transposed_fails_in_peft():
    class One(nn.Module):
        is_transposed = True

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(1, 5, 7))

        def forward(self, x):
            return x @ self.w[0]

    ours, theirs = pair(lambda: nn.Sequential(One()), target_modules=[], target_parameters=["w"])
    with pytest.raises(RuntimeError):
        theirs(x())
    layer = ours.base_model.model[0]
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = x().double() @ (layer.get_param()[0].double() + a.t() @ b.t())
    close(ours(x()), exact)


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
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
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
