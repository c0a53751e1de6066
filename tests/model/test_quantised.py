"""Adapters on base layers that are quantised, beside PEFT's; ``pip install -e .[quantised]`` installs the packages."""

import importlib

import pytest
import torch
from torch import nn

import lora_kernels as lk

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


# bitsandbytes' 4-bit layer computes in bf16 where nothing is to be differentiated.
OTHER_WAY = {"rtol": 0.02, "atol": 0.02}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(128, 128), nn.Linear(128, 64)

    def forward(self, x):
        return self.outer(torch.relu(self.inner(x)))


def _bitsandbytes(model, bits):
    modules = importlib.import_module("bitsandbytes.nn")
    for name, layer in list(model.named_children()):
        if bits == 4:
            quantised = modules.Linear4bit(*layer.weight.T.shape, compute_dtype=torch.float32, quant_type="nf4")
            quantised.weight = modules.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        else:
            quantised = modules.Linear8bitLt(*layer.weight.T.shape, has_fp16_weights=False, threshold=6.0)
            quantised.weight = modules.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        quantised.bias = layer.bias
        setattr(model, name, quantised.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)  # where PEFT looks for its own kind of layer


def _torchao(model):
    quantization = importlib.import_module("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def _quanto(model):
    quanto = importlib.import_module("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


KINDS = {
    "bitsandbytes 4 bit": ("bitsandbytes", lambda model: _bitsandbytes(model, 4)),
    "bitsandbytes 8 bit": ("bitsandbytes", lambda model: _bitsandbytes(model, 8)),
    "torchao": ("torchao", _torchao),
    "quanto": ("optimum.quanto", _quanto),
}


@pytest.fixture(params=KINDS)
def base(request):
    """A function that makes the quantised model."""
    package, quantise = KINDS[request.param]
    pytest.importorskip(package)

    def make():
        model = Net()
        quantise(model)
        return model.eval()

    return make


def _pair(base):
    """(PEFT's model, ours) with the same two adapters."""
    models = []
    for package in (peft, lk):
        config = {"target_modules": ["inner", "outer"], "r": 4, "init_lora_weights": False}
        model = package.get_peft_model(base(), package.LoraConfig(**config))
        model.add_adapter("b", package.LoraConfig(**{**config, "r": 8, "target_modules": ["outer"]}))
        models.append(model.eval())
    for name in ("default", "b"):
        lk.set_peft_model_state_dict(models[1], peft.get_peft_model_state_dict(models[0], adapter_name=name), name)
    return models


def x():
    return torch.randn(4, 128, generator=torch.Generator().manual_seed(5))


def test_outputs_and_gradients_are_pefts(base):
    theirs, ours = _pair(base)
    gradients = []
    for model in (theirs, ours):
        model.train()  # in eval mode bitsandbytes repacks 4-bit weights, and has no gradient for them then
        model(x()).square().sum().backward()
        gradients.append([p.grad for n, p in model.named_parameters() if p.grad is not None])
    torch.testing.assert_close(ours(x()), theirs(x()))
    assert len(gradients[0]) == 4
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
    with theirs.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(x()), theirs(x()))
    theirs.base_model.set_adapter(["default", "b"])
    ours.set_adapter(["default", "b"])
    torch.testing.assert_close(ours(x()), theirs(x()))


def test_a_mixed_batch(base):
    ours = _pair(base)[1]
    names = ["b", "__base__", "default", "b"]
    got = ours(x(), adapter_names=names)
    for row, name in enumerate(names):
        with ours.disable_adapter() if name == "__base__" else _active(ours, name):
            torch.testing.assert_close(got[row], ours(x())[row], **OTHER_WAY)


def _active(model, name):
    model.set_adapter(name)
    return torch.no_grad()


def test_checkpoints_both_ways(base, tmp_path):
    theirs, ours = _pair(base)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    expected = theirs(x()).detach()
    torch.testing.assert_close(lk.PeftModel.from_pretrained(base(), tmp_path / "theirs")(x()), expected, **OTHER_WAY)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base(), tmp_path / "ours")(x()), expected, **OTHER_WAY)


def test_merging_is_refused_and_changes_nothing(base):
    """PEFT merges into bitsandbytes' weights by quantising the sum anew: unmerging does not give them back."""
    theirs, ours = _pair(base)
    before = ours(x())
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(ValueError, match="can not be merged into; expected a plain parameter"):
            merge()
        assert torch.equal(ours(x()), before)
    if type(base().inner).__module__.startswith("bitsandbytes"):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
        assert (theirs(x()) - before).norm() > 0.003 * before.norm()
    assert type(ours.unload().inner) is type(base().inner)


def test_peft_models_are_left_as_they_are(base):
    theirs = _pair(base)[0]
    before = theirs(x())
    report = str(lk.accelerate(theirs))
    assert "0 layers replaced, 2 left" in report
    assert torch.equal(theirs(x()), before)
