"""nn.MultiheadAttention: float64 with updated weights is the truth; peft counts ``out_proj`` twice and drifts."""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

import lora_kernels as lk

from .oracle import close, pair, randomize


class Model(nn.Module):
    def __init__(self, batch_first=True, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=batch_first, **options)
        self.head = nn.Linear(12, 4)

    def forward(self, x, mask=None):
        return self.head(self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0])


CONFIG = {"target_modules": ["attention"], "r": 4, "lora_alpha": 6}


def x():
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(5))


def truth(ours, x, mask=None, names=("default",), out_proj=1.0):
    """The plain model in float64 with both updates in its weights."""
    model = copy.deepcopy(ours)
    layer = model.base_model.model.attention
    out = layer.base_layer.out_proj
    deltas = [sum(part.get_delta_weight(name).double() for name in names) for part in (layer, out)]
    plain = model.unload().double()
    with torch.no_grad():
        plain.attention.in_proj_weight += deltas[0]
        plain.attention.out_proj.weight += deltas[1] * out_proj
    return plain(x.double(), mask)


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": False}, {"add_bias_kv": True}])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_and_backward(options, grad):
    ours, _ = pair(lambda: Model(**options), ("default", "b"), **CONFIG)
    mask = None if options.get("batch_first") is False else torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(grad):
        close(ours(x(), mask), truth(ours, x(), mask))
        ours.base_model.set_adapter(["default", "b"])
        close(ours(x(), mask), truth(ours, x(), mask, ("default", "b")))
    if grad:
        ours(x(), mask).square().sum().backward()
        exact = exact_gradients(ours, x(), mask)
        trained = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
        assert len(trained) == 8
        for name, gradient in trained.items():
            close(gradient, exact[name])


def exact_gradients(ours, x, mask):
    """Of ``sum(y²)`` in float64, with ``W + Σ s · B A`` written out."""
    plain = copy.deepcopy(ours).unload().double().requires_grad_(False)
    factors = {n: p.detach().double().requires_grad_() for n, p in ours.named_parameters() if "lora_" in n}
    layer, prefix = ours.base_model.model.attention, "base_model.model.attention."
    weights = {}
    for part, path, key in (
        (layer, prefix, "attention.in_proj_weight"),
        (layer.base_layer.out_proj, prefix + "base_layer.out_proj.", "attention.out_proj.weight"),
    ):
        updates = [
            part.scaling[n] * factors[f"{path}lora_B.{n}.weight"] @ factors[f"{path}lora_A.{n}.weight"] for n in part.r
        ]
        weights[key] = dict(plain.named_parameters())[key] + sum(updates)
    torch.func.functional_call(plain, weights, (x.double(), mask)).square().sum().backward()
    return {name: factor.grad for name, factor in factors.items()}


def test_peft_counts_out_proj_twice_and_its_weights_drift():
    ours, theirs = pair(Model, **CONFIG)
    ours.load_state_dict(randomize(theirs, scale=0.25).state_dict())
    exact = truth(ours, x())
    with torch.no_grad():
        before = [m.base_model.model.attention.base_layer.in_proj_weight.clone() for m in (ours, theirs)]
        wrong = theirs(x())
        assert (wrong - exact).norm() / exact.norm() > 0.05
        close(wrong, truth(ours, x(), out_proj=2.0))
        lk.peft_compat(ours, attention_out_twice=True)
        close(ours(x()), wrong.double())
        lk.peft_compat(ours, attention_out_twice=False)
        for _ in range(100):
            ours(x())
            theirs(x())
    after = [m.base_model.model.attention.base_layer.in_proj_weight for m in (ours, theirs)]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_merge_disable_switch_copy_and_unload():
    ours, _ = pair(Model, ("default", "b"), **CONFIG)
    layer = ours.base_model.model.attention
    expected, plain = ours(x()), ours.get_base_model()
    with ours.disable_adapter():
        base = ours(x())
    assert layer.num_heads == 3
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x()), expected)
    ours.merge_adapter(safe_merge=True)
    assert layer.merged_adapters == layer.base_layer.out_proj.merged_adapters == ["default"]
    close(ours(x()), expected.double())
    with ours.disable_adapter():
        close(ours(x()), base.double(), expected)
    ours.unmerge_adapter()
    close(ours(x()), expected.double())
    ours.merge_adapter()
    ours.switch_adapter("b")
    close(ours(x()), truth_of(ours, "b"))
    ours.unmerge_adapter()
    ours.set_adapter("default")
    ours.delete_adapter("b")
    close(ours(x()), expected.double())
    with pytest.raises(TypeError, match="mixed"):
        ours(x(), adapter_names=["default", "__base__"])
    whole = ours.merge_and_unload()
    assert whole is plain
    assert type(whole.attention) is nn.MultiheadAttention
    assert not any("lora" in name for name, _ in whole.named_modules())
    close(whole(x()), expected.double())


def truth_of(ours, name):
    twin = copy.deepcopy(ours)
    twin.unmerge_adapter()
    return truth(twin, x(), names=(name,))


def test_checkpoints_both_ways(tmp_path):
    ours, theirs = pair(Model, **CONFIG)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert sorted(a) == sorted(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
    for side in ("ours", "theirs"):
        torch.manual_seed(0)
        loaded = lk.PeftModel.from_pretrained(Model(), str(tmp_path / side), low_cpu_mem_usage=side == "ours")
        close(loaded(x()), ours(x()).double())
    torch.manual_seed(0)
    close(peft.PeftModel.from_pretrained(Model(), str(tmp_path / "ours")).eval()(x()), theirs(x()).double())


def test_what_can_not_be_leaves_the_model_as_it_was():
    for change in ({"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}):
        model = Model()
        with pytest.raises(ValueError, match=next(iter(change))):
            lk.get_peft_model(model, lk.LoraConfig(**CONFIG, **change))
        assert not any("lora" in name for name, _ in model.named_modules())
    with pytest.raises(ValueError, match="Only same embed"):
        lk.get_peft_model(Model(kdim=7, vdim=12), lk.LoraConfig(**CONFIG))
    encoder = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, dropout=0.0)
    ours = randomize(lk.get_peft_model(encoder, lk.LoraConfig(target_modules=["self_attn"]))).eval()
    with torch.no_grad():
        y = ours(x())
        ours.merge_adapter()
        close(ours(x()), y.double())


def test_the_status_of_the_layer_is_pefts():
    ours, theirs = (
        [vars(status) for status in package.get_peft_model(Model(), package.LoraConfig(**CONFIG)).get_layer_status()]
        for package in (lk, peft)
    )
    assert ours == theirs


def test_a_bias_on_b_is_refused_where_peft_has_one_that_takes_no_part():
    theirs = randomize(peft.get_peft_model(Model(), peft.LoraConfig(**CONFIG, lora_bias=True))).eval()
    with torch.no_grad():
        before = theirs(x())
        theirs.base_model.model.attention.lora_B["default"].bias += 5
        assert torch.allclose(theirs(x()), before, atol=1e-5)
    with pytest.raises(ValueError, match="does not support lora_bias"):
        lk.get_peft_model(Model(), lk.LoraConfig(**CONFIG, lora_bias=True))
