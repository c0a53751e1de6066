"""What a call with gradients keeps for the backward, and what it asks on the way."""

import torch

from lora_kernels.ops import lora_linear
from lora_kernels.testing import make_linear


def test_a_training_call_asks_once_whether_it_is_compiled(monkeypatch):
    args, asked = make_linear(4, 16, 16, 4).args(), []
    args[3].requires_grad_()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: asked.append(1))
    lora_linear(*args).sum().backward()
    assert len(asked) == 1
