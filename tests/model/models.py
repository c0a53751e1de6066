"""Small models that the tests of the layer share, and the formula they are checked against."""

import torch
from torch import nn


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
