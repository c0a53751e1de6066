"""``layers_to_transform`` with and without ``layers_pattern``, against PEFT's own list of targets."""

import pytest
import torch

import lora_kernels as lk

peft = pytest.importorskip("peft")

LAYOUTS = {"bert": "layer", "gpt2": "h", "llama": "layers", "vit": "blocks", "exotic": "glacier"}


class Stacked(torch.nn.Module):
    """``encoder.<pattern>.<index>.attention.query`` and a linear layer beside the stack."""

    def __init__(self, pattern):
        super().__init__()
        self.encoder = torch.nn.Module()
        blocks = []
        for _ in range(4):
            block = torch.nn.Module()
            block.attention = torch.nn.ModuleDict({"query": torch.nn.Linear(4, 4), "value": torch.nn.Linear(4, 4)})
            block.experts = torch.nn.ModuleList(torch.nn.ModuleDict({"query": torch.nn.Linear(4, 4)}) for _ in range(2))
            blocks.append(block)
        setattr(self.encoder, pattern, torch.nn.ModuleList(blocks))
        self.query = torch.nn.Linear(4, 4)


@pytest.mark.parametrize("layers", [1, [0, 3]])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_pattern_gives_the_targets_of_peft(layout, explicit, layers):
    values = {"target_modules": ["query"], "layers_to_transform": layers}
    if explicit:
        values["layers_pattern"] = [LAYOUTS[layout]]
    found = []
    for package, kind in ((peft, peft.tuners.lora.LoraLayer), (lk, lk.tuners.lora.LoraLayer)):
        made = package.get_peft_model(Stacked(LAYOUTS[layout]), package.LoraConfig(**values))
        found.append([name for name, module in made.named_modules() if isinstance(module, kind)])
    assert found[0] == found[1] != []
