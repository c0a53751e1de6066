"""One layer to PEFT and back: what is shared, what is kept, what is refused."""

import pytest
import torch
from torch import nn

from lora_kernels.layers import LoraLinear

from .layer import make


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_from_peft_and_to_peft_share_everything(dropout):
    pytest.importorskip("peft")
    layer = make(use_rslora=True, lora_dropout=dropout)
    layer.update_layer("b", 3, 6, init_lora_weights=False)
    layer.set_scale("default", 0.7)
    layer.set_adapter(["default", "b"])
    x = torch.randn(5, 12)
    layer.eval()
    theirs = layer.to_peft()
    assert theirs.lora_A["b"].weight is layer.lora_A["b"].weight
    assert list(theirs.state_dict()) == list(layer.state_dict())
    torch.testing.assert_close(theirs(x), layer(x))
    back = LoraLinear.from_peft(theirs)
    assert back.lora_B["b"].weight is layer.lora_B["b"].weight
    assert back.scaling == layer.scaling
    torch.testing.assert_close(back(x), layer(x))
    theirs.merge()
    merged = LoraLinear.from_peft(theirs)
    assert merged.merged_adapters == ["default", "b"]
    torch.testing.assert_close(merged(x), theirs(x))


def test_to_peft_keeps_what_trains_and_refuses_what_it_would_lose():
    pytest.importorskip("peft")
    layer = LoraLinear.from_linear(nn.Linear(8, 6), r=2)
    layer.update_layer("b", 3, 6)
    layer.set_adapter("b")
    before = {name: p.requires_grad for name, p in layer.named_parameters()}
    layer.to_peft()
    assert {name: p.requires_grad for name, p in layer.named_parameters()} == before
    for options in ({"use_dora": True}, {"lora_bias": True}):
        other = LoraLinear.from_linear(nn.Linear(8, 6), r=2)
        other.update_layer("b", 2, 4, **options)
        with pytest.raises(ValueError, match="adapter 'b' has DoRA or lora_bias"):
            other.to_peft()
    merged = LoraLinear.from_linear(nn.Linear(8, 6), r=2, init_lora_weights=False)
    merged.merge()
    merged.set_scale("default", 3.0)
    with pytest.raises(ValueError, match="scaled after it was merged"):
        merged.to_peft()
