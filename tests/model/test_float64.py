"""Models in float64 equal PEFT's to float64 rounding: outputs, gradients, merges, files."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
NEAR = {"rtol": 1e-12, "atol": 1e-12}
IDS = torch.tensor([[1, 2, 3, 3], [0, 9, 8, 1], [5, 5, 0, 2]])


class Net(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.emb, self.up, self.down = nn.Embedding(10, 8), nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.conv, self.attention = nn.Conv1d(8, 8, 3, padding=1), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids):
        x = self.emb(ids)
        x = self.conv((x + self.down(torch.tanh(self.up(x)))).mT).mT
        return x + self.attention(x, x, x)[0]


def pair(targets=("emb", "up", "down", "conv"), dtype=torch.float64, names=("default",), **fields):
    """The same model and adapters in peft and here."""
    torch.manual_seed(0)
    base = Net().to(dtype)
    made = []
    for package in (peft, lk):
        config = package.LoraConfig(r=3, lora_alpha=7, target_modules=list(targets), **fields)
        model = package.get_peft_model(copy.deepcopy(base), config)
        for name in names[1:]:
            model.add_adapter(name, package.LoraConfig(r=2, lora_alpha=5, target_modules=["up", "emb"]))
        made.append(model)
    theirs, ours = made
    generator = torch.Generator().manual_seed(1)
    state = {
        key: torch.randn(value.shape, dtype=value.dtype, generator=generator) * 0.3 if "lora_" in key else value
        for key, value in theirs.state_dict().items()
    }
    for model in made:
        model.load_state_dict(state)
    assert {k: v.dtype for k, v in ours.state_dict().items()} == {k: v.dtype for k, v in theirs.state_dict().items()}
    return theirs, ours


def same(ours, theirs):
    assert ours.dtype is theirs.dtype
    torch.testing.assert_close(ours, theirs, **NEAR)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True, "targets": ("up", "conv")}])
def test_step_merge_and_file(fields, tmp_path):
    theirs, ours = pair(**fields)
    gradients = []
    for model in (theirs, ours):
        model(IDS).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        same(gradients[1][name], gradient)
    apart = ours(IDS).detach()
    same(apart, theirs(IDS).detach())
    ours.save_pretrained(tmp_path)
    for model in (theirs, ours):
        model.merge_adapter()
    weights = {k: v for k, v in theirs.state_dict().items() if "base_layer" in k}
    for key, weight in weights.items():
        same(ours.state_dict()[key], weight)
    ours.unmerge_adapter()
    same(ours(IDS).detach(), apart)
    torch.manual_seed(0)
    loaded = lk.PeftModel.from_pretrained(Net().double(), str(tmp_path))
    same(loaded(IDS), apart)
    same(loaded.merge_and_unload()(IDS).detach(), apart)


def test_several_adapters_in_a_sum_and_in_a_batch():
    theirs, ours = pair(names=("default", "b"))
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "b"])
    same(ours(IDS), theirs(IDS))
    for model in (theirs, ours):
        model.eval().base_model.set_adapter("default")
    names = ["default", "__base__", "b"]
    same(ours(IDS, adapter_names=names), theirs(IDS, adapter_names=names))
    for model in (theirs, ours):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.7], "c", "cat")
        model.base_model.set_adapter("c")
    same(ours(IDS), theirs(IDS))


def test_a_model_that_becomes_float64_and_float32_again():
    theirs, ours = pair(dtype=torch.float32)
    before = ours(IDS).detach()
    for model in (theirs, ours):
        model.double()
    same(ours(IDS), theirs(IDS))
    assert torch.equal(ours.float()(IDS), before)


def test_attention():
    _, ours = pair(targets=("attention",))
    apart = ours(IDS).detach()
    assert apart.dtype is torch.float64
    same(ours.merge_and_unload()(IDS).detach(), apart)
