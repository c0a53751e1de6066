"""Small models that the tests of the layer share, and the formula they are checked against."""

import copy

import torch
from torch import nn

from lora_kernels.config import LoraConfig
from lora_kernels.layers import LoraLayer
from lora_kernels.model import get_peft_model


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return x + torch.tanh(self.q_proj(self.norm(x))) * self.v_proj(x)


class Tiny(nn.Module):
    """Token ids (batch, length) -> logits (batch, length, 5)."""

    def __init__(self, dim=16, layers=2):
        super().__init__()
        self.embed = nn.Embedding(11, dim, padding_idx=0)
        self.layers = nn.ModuleList(Block(dim) for _ in range(layers))
        self.head = nn.Linear(dim, 5)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tiny(seed=0, dtype=torch.float32):
    """The same model for the same seed."""
    torch.manual_seed(seed)
    return Tiny().to(dtype)


def token_ids(seed=1):
    return torch.randint(0, 11, (3, 4), generator=torch.Generator().manual_seed(seed))


def randomize(model, seed=2):
    """Gives every adapter tensor and every module saved in full values that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def wrapped(targets=("q_proj", "v_proj"), names=("default", "b"), **values):
    """A tiny model with adapters of random numbers, in eval mode."""
    model = get_peft_model(tiny(), LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **values), names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(r=2, lora_alpha=3, target_modules=list(targets)))
    return randomize(model).eval()


def weights(model):
    """Copies of all that is no adapter's."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


class Oracle:
    """The model and its adapters as plain tensors: W + Σ s B A, kept in float64."""

    def __init__(self, model):
        self.base = copy.deepcopy(model).double()
        self.adapters, self.active, self.disabled = {}, [], False
        self.merged = []

    def learn(self, name, model):
        entries = {}
        for path, layer in model.get_base_model().named_modules():
            if isinstance(layer, LoraLayer) and name in layer.r:
                if name in layer.lora_A:
                    delta = layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double()
                else:
                    delta = (layer.lora_embedding_B[name].double() @ layer.lora_embedding_A[name].double()).T
                entries[path] = delta.detach() * layer.lora_alpha[name] / layer.r[name]
        self.adapters[name] = entries

    def __call__(self, ids):
        model = copy.deepcopy(self.base)
        if not self.disabled:
            for name in dict.fromkeys([*self.active, *self.merged]):
                for path, delta in self.adapters[name].items():
                    with torch.no_grad():
                        model.get_submodule(path).weight.add_(delta)
        return model(ids)
