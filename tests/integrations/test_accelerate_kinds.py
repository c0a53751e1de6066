"""``accelerate`` on every kind of layer and variant that ``peft`` builds: the same results, merges and row batches."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lora_kernels as lk

peft = pytest.importorskip("peft")
from peft.tuners.lora.layer import LoraLayer  # noqa: E402

from lora_kernels.integrations.peft_layers import CLASSES  # noqa: E402
from lora_kernels.integrations.peft_merge import LoraModel, Merging  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
OURS = tuple(CLASSES.values())
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def rows(x):
    return x.unsqueeze(0) if x.dim() == 1 else x


def conv1d(features_in, features_out):
    layer = pytest.importorskip("transformers").pytorch_utils.Conv1D(features_out, features_in)
    nn.init.normal_(layer.bias)
    return layer


# kind -> (the base layer, its input of n items)
KINDS = {
    "linear": (lambda: nn.Linear(24, 17), lambda n: torch.randn(n, 5, 24)),
    "conv1d_of_transformers": (lambda: conv1d(24, 17), lambda n: torch.randn(n, 5, 24)),
    "embedding": (lambda: nn.Embedding(13, 24, padding_idx=1), lambda n: torch.randint(0, 13, (n, 5))),
    "conv1": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda n: torch.randn(n, 4, 9)),
    "conv2": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, bias=False), lambda n: torch.randn(n, 4, 9, 8)),
    "conv2_1x1": (lambda: nn.Conv2d(4, 6, 1), lambda n: torch.randn(n, 4, 3, 2)),
    "conv2_groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda n: torch.randn(n, 4, 5, 5)),
    "conv3": (lambda: nn.Conv3d(2, 3, 2), lambda n: torch.randn(n, 2, 4, 3, 5)),
}
MERGEABLE = [kind for kind in KINDS if kind != "conv2_groups"]


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.part = layer

    def forward(self, x):
        return self.part(x)


def pair(kind, names=("default",), dtype=torch.float32, **config):
    """The same model as PEFT made it, and accelerated."""
    torch.manual_seed(3)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["part"], **config}
    theirs = peft.get_peft_model(One(KINDS[kind][0]()).to(dtype), peft.LoraConfig(**config), names[0])
    for name in names[1:]:
        theirs.add_adapter(name, peft.LoraConfig(**config))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data, std=0.3)
    ours = copy.deepcopy(theirs)
    report = lk.accelerate(ours)
    assert report.replaced == ["base_model.model.part"], str(report)
    assert isinstance(ours.base_model.model.part, OURS)
    return theirs, ours


def inputs(kind, n=3, dtype=torch.float32):
    torch.manual_seed(7)
    x = KINDS[kind][1](n)
    return x.to(dtype) if x.is_floating_point() else x


def exact(theirs):
    """The same model in float64, computed by PEFT."""
    return copy.deepcopy(theirs).double()


def within_budget(got, theirs, expected, ulps=1):
    """Our error is at most PEFT's and one rounding of the result."""
    assert got.dtype == theirs.dtype
    allowed = (theirs.double() - expected).norm() + ulps * EPS[theirs.dtype] * expected.norm()
    assert (got.double() - expected).norm() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients(kind, dtype, monkeypatch):
    theirs, ours = pair(kind, dtype=dtype)
    results = []
    for model in (theirs, ours, exact(theirs)):
        x = inputs(kind, dtype=next(model.base_model.model.part.base_layer.parameters()).dtype)
        y = model(x)
        y.double().square().sum().backward()
        results.append((y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (y, grads), (our_y, our_grads), (expected, exact_grads) = results
    within_budget(our_y, y, expected)
    assert our_grads.keys() == grads.keys()
    assert len(grads) == 2
    for name in grads:
        assert our_grads[name].dtype == grads[name].dtype
        within_budget(our_grads[name], grads[name], exact_grads[name], ulps=4)
    calls = []
    for cls in CLASSES:
        forward = cls.forward
        monkeypatch.setattr(cls, "forward", lambda self, *a, f=forward, **k: (calls.append(self), f(self, *a, **k))[1])
    with torch.inference_mode():
        within_budget(ours(inputs(kind, dtype=dtype)), y, expected)
    assert not calls


@pytest.mark.parametrize("kind", ["linear", "conv1d_of_transformers", "embedding", "conv1", "conv2"])
def test_life_between(kind):
    theirs, ours = pair(kind, ("a", "b"), lora_dropout=0.1)
    x = inputs(kind)

    def both(function):
        for model in (theirs, ours):
            function(model.eval())
        expected = exact(theirs)(inputs(kind, dtype=torch.float64))
        with torch.no_grad():
            within_budget(ours(x), theirs(x), expected, ulps=4)

    both(lambda m: m.base_model.set_adapter(["a", "b"]))
    both(lambda m: m.set_adapter("b"))
    both(lambda m: m.base_model.model.part.set_scale("b", 0.5))
    both(lambda m: m.base_model.disable_adapter_layers())
    both(lambda m: m.base_model.enable_adapter_layers())
    both(lambda m: m.merge_adapter())
    both(lambda m: m.unmerge_adapter())
    both(lambda m: m.add_adapter("c", peft.LoraConfig(r=2, target_modules=["part"], init_lora_weights=True)))
    both(lambda m: m.base_model.set_adapter(["a", "c"]))
    both(lambda m: m.delete_adapter("a"))
    lk.restore(ours)
    assert type(ours.base_model.model.part) in CLASSES
    both(lambda m: m.set_adapter("b"))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MERGEABLE)
def test_merge_and_unmerge_are_ours(kind, dtype, safe, monkeypatch):
    theirs, ours = pair(kind, ("a", "b"), dtype=dtype)
    before = ours.base_model.model.part.base_layer.weight.detach().clone()
    theirs.base_model.set_adapter(["a", "b"])
    ours.base_model.set_adapter(["a", "b"])
    wide = exact(theirs)
    for model in (theirs, wide):
        model.merge_adapter(safe_merge=safe)
    calls = []
    monkeypatch.setattr(LoraLayer, "get_delta_weight", lambda *a: calls.append(a), raising=False)
    for cls in CLASSES:
        monkeypatch.setattr(cls, "get_delta_weight", lambda *a: calls.append(a))
    ours.merge_adapter(safe_merge=safe)
    weights = [m.base_model.model.part.base_layer.weight.detach() for m in (ours, theirs, wide)]
    within_budget(*weights, ulps=2)
    assert ours.base_model.model.part.merged_adapters == ["a", "b"]
    ours.unmerge_adapter()
    assert not ours.base_model.model.part.merged
    assert not calls
    after = ours.base_model.model.part.base_layer.weight.detach()
    assert (after.double() - before.double()).norm() <= 4 * EPS[dtype] * (before.double().norm() + weights[2].norm())


def test_safe_merge_names_the_broken_adapter_and_keeps_the_weight():
    _, ours = pair("linear", ("good", "broken"))
    layer = ours.base_model.model.part
    with torch.no_grad():
        layer.lora_A["broken"].weight[0, 0] = float("inf")
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="The adapter broken seems to be broken"):
        ours.merge_adapter(adapter_names=["broken"], safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


def test_merge_warnings_and_errors_are_those_of_peft():
    theirs, ours = pair("linear", ("a", "b"))
    for calls in (
        [("merge_adapter", {}), ("merge_adapter", {})],
        [("merge_adapter", {}), ("merge_adapter", {"adapter_names": ["a", "b"]}), ("unmerge_adapter", {})],
        [("unmerge_adapter", {})],
        [("merge_adapter", {"adapter_names": "a"})],
        [("merge_adapter", {"adapter_names": ["nobody"]})],
        [("merge_and_unload", {"adapter_names": ["b"]})],
    ):
        told = []
        for model in (copy.deepcopy(theirs), copy.deepcopy(ours)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                errors = []
                for name, arguments in calls:
                    try:
                        result = getattr(model, name)(**arguments)
                    except Exception as error:
                        errors.append((type(error), str(error)))
            told.append(([str(w.message) for w in caught], errors, type(result).__name__))
        assert told[0] == told[1]


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2"])
def test_one_adapter_a_row_without_a_hook(kind, monkeypatch):
    theirs, ours = pair(kind, ("a", "b", "c"))
    names = ["a", "__base__", "c", "b", "a", "c"]
    x = inputs(kind, 6)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        expected = exact(theirs)(inputs(kind, 6, torch.float64), adapter_names=names)
        hooked = []
        register = nn.Module.register_forward_pre_hook
        got = theirs(x, adapter_names=names)
        monkeypatch.setattr(
            nn.Module, "register_forward_pre_hook", lambda s, *a, **k: (hooked.append(s), register(s, *a, **k))[1]
        )
        within_budget(ours(x, adapter_names=names), got, expected, ulps=2)
    assert bool(hooked) == (kind != "linear")
    part = ours.base_model.model.part
    assert not part._forward_pre_hooks
    assert "_row_adapters" not in part.__dict__
    for bad, error in ((["a"], "Length"), (["x"] * 6, "non-existing"), (["a"] * 5, "Length")):
        with pytest.raises(ValueError, match=error):
            ours(x, adapter_names=bad)
        assert "_row_adapters" not in part.__dict__
        assert not part._forward_pre_hooks
    with pytest.raises(ValueError, match="training"):
        ours.train()(x, adapter_names=names)
    ours.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        ours(x, adapter_names=names)


def test_rows_of_a_model_with_a_head_and_different_targets():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]), "a")
    theirs.add_adapter("b", peft.LoraConfig(r=3, target_modules=["0", "1"], modules_to_save=["2"]))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter.data)
    ours = copy.deepcopy(theirs)
    assert len(lk.accelerate(ours).replaced) == 2
    x, names = torch.randn(4, 8), ["b", "a", "__base__", "b"]
    with torch.no_grad():
        expected = exact(theirs).eval()(x.double(), adapter_names=names)
        within_budget(ours.eval()(x, adapter_names=names), theirs.eval()(x, adapter_names=names), expected)


def test_the_model_is_turned_and_put_back():
    theirs, ours = pair("linear")
    assert type(ours.base_model) is LoraModel
    assert type(ours.base_model).__name__ == type(theirs.base_model).__name__
    assert isinstance(ours.base_model, type(theirs.base_model))
    assert ours.get_model_status() == theirs.get_model_status()
    assert lk.restore(ours) == 1
    assert type(ours.base_model) is type(theirs.base_model)
    assert not any(isinstance(m, Merging) for m in ours.modules())
