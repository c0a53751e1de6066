"""rsLoRA, patterns, biases, modules saved in full and DoRA through merge, exact merge and switch of a whole model,
against PEFT's own ``merge_and_unload`` of the same adapter in float64."""

import copy

import pytest
import torch
from exact_cases import BF16, F32, same_bits
from torch import nn

import lora_kernels as lk
from lora_kernels.testing import assert_within_budget

peft = pytest.importorskip("peft")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(24, 40), nn.Linear(40, 24, bias=False), nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.norm(self.v_proj(torch.tanh(self.q_proj(x)))))


BOTH = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6}
SUMS = {
    "rslora": {**BOTH, "use_rslora": True},
    "patterns": {**BOTH, "rank_pattern": {"v_proj": 7}, "alpha_pattern": {"^q_proj": 31}},
    "bias_all": {**BOTH, "bias": "all"},
    "bias_lora_only": {**BOTH, "bias": "lora_only"},
    "modules_to_save": {**BOTH, "modules_to_save": ["head", "norm"]},
    "together": {
        **BOTH,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"v_proj": 9},
        "modules_to_save": ["head"],
    },
}
NOT_SUMS = {
    "dora": {**BOTH, "use_dora": True},
    "dora_patterns": {**BOTH, "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "dora_bias_all": {**BOTH, "use_dora": True, "bias": "all"},
    "lora_bias": {"target_modules": ["q_proj"], "r": 3, "lora_bias": True},
}
# The biases are the base's own: PEFT lets one adapter at a time train them.
SEVERAL = [name for name in SUMS if not name.startswith("bias")]


def wrapped(package, case, dtype, name="a", model=None):
    """``case`` as adapter ``name``, with the same trained values for either package."""
    config = package.LoraConfig(**{**SUMS, **NOT_SUMS, "plain": BOTH}[case])
    before = set() if model is None else {n for n, _ in model.named_parameters()}
    if model is None:
        torch.manual_seed(0)
        model = package.get_peft_model(Tiny().to(dtype), config, name)
    else:
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    for key, parameter in sorted(model.named_parameters()):
        new = key not in before and (parameter.requires_grad or f".{name}." in key or key.endswith(f".{name}"))
        if new:
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            # Factors are drawn anew: what they are at first depends on what was drawn before.
            start = 0 if "lora_A" in key or "lora_B" in key else parameter.data.float()
            parameter.data = (start + noise).to(parameter.dtype)
    return model.eval()


def peft_merged(case, dtype):
    """PEFT's merge of ``case``, computed in ``dtype`` and in float64 from the same values."""
    model = wrapped(peft, case, dtype)
    exact = copy.deepcopy(model).double().merge_and_unload().state_dict()
    return model.merge_and_unload().state_dict(), exact


def check_against_peft(model, case, dtype):
    eager, exact = peft_merged(case, dtype)
    got = copy.deepcopy(model).merge_and_unload().state_dict() if isinstance(model, lk.PeftModel) else model
    assert set(got) == set(exact)
    for name, tensor in got.items():
        assert tensor.dtype == dtype
        assert_within_budget(tensor, eager[name], exact[name], f"{case} {name}")
    torch.manual_seed(0)
    base = Tiny().to(dtype).state_dict()
    assert not torch.equal(got["q_proj.weight"], base["q_proj.weight"])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", [*SUMS, *NOT_SUMS])
def test_merge(case, dtype):
    """Merged, then unwrapped."""
    check_against_peft(wrapped(lk, case, dtype), case, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", SUMS)
def test_exact_merge_and_back(case, dtype):
    model = wrapped(lk, case, dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = torch.randn(3, 24).to(dtype)
    with torch.no_grad():
        output = model(x)
    model.merge_adapter(exact=True)
    assert all(layer.merged_adapters == ["a"] for layer in model.base_model.lora_layers())
    # What is merged computes the same; its weights, biases and saved modules are PEFT's.
    with torch.no_grad():
        torch.testing.assert_close(model(x), output, rtol=0.05 if dtype == BF16 else 1e-4, atol=0.02)
    check_against_peft(model, case, dtype)
    model.unmerge_adapter()
    assert all(same_bits(p, before[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(x), output)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("case", SEVERAL)
def test_switch(case, exact):
    """From a plain adapter to one with the option, and back; the bits of a merge into the original where exact."""
    model = wrapped(lk, "plain", F32, "b")
    model = wrapped(lk, case, F32, "a", model)
    alone = copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.merge_adapter(["b"], exact=exact)
    model.switch_adapter("b", "a")
    assert model.active_adapters == ["a"]
    if exact:
        alone.set_adapter("a")
        alone.merge_adapter(["a"], exact=True)
        wanted = dict(alone.named_parameters())
        assert all(same_bits(p, wanted[n]) for n, p in model.named_parameters())
        check_against_peft(model, case, F32)
    else:
        _, wanted = peft_merged(case, F32)
        for name, tensor in copy.deepcopy(model).merge_and_unload().state_dict().items():
            torch.testing.assert_close(tensor, wanted[name].float(), rtol=1e-5, atol=1e-5)
    model.switch_adapter("a", "b")
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if exact:
            assert same_bits(parameter, before[name])
        else:
            torch.testing.assert_close(parameter, before[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [name for name in NOT_SUMS if "bias_all" not in name])
def test_plain_switch_to_what_is_more_than_a_sum(case):
    model = wrapped(lk, "plain", F32, "b")
    model = wrapped(lk, case, F32, "a", model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.merge_adapter(["b"])
    model.switch_adapter("b", "a")
    _, wanted = peft_merged(case, F32)
    for name, tensor in copy.deepcopy(model).merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensor, wanted[name].float(), rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", NOT_SUMS)
def test_exact_merge_of_what_is_more_than_a_sum_is_refused_by_name(case):
    model = wrapped(lk, case, F32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"exact: adapter 'a' has (use_dora|lora_bias)=True"):
        model.merge_adapter(exact=True)
    assert all(same_bits(p, before[n]) for n, p in model.named_parameters())
    assert not any(layer.merged for layer in model.base_model.lora_layers())
