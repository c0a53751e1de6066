"""``torch.jit.trace`` with gradients on: its own check runs without, so both have to record the same ops."""

import io

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.ops import grouped_lora_linear, lora_add_, lora_embedding, lora_linear, multi_lora_linear, plan_batch
from lora_kernels.testing import make_linear

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


class _Call(nn.Module):
    def __init__(self, call):
        super().__init__()
        case = make_linear(4, 16, 24, 4)
        self.weight, self.bias, self.call = case.weight, case.bias, call
        self.lora_a, self.lora_b = nn.Parameter(case.lora_a), nn.Parameter(case.lora_b)
        self.plan = plan_batch([0, -1, 0, 0], num_slots=1)

    def forward(self, x):
        return self.call(self, x)


def _grouped(m, x):
    return torch.cat(grouped_lora_linear(x, [m.weight] * 2, None, [m.lora_a] * 2, [m.lora_b] * 2, [0.5, 2.0]), 1)


CALLS = {
    "lora_linear": lambda m, x: lora_linear(x, m.weight, m.bias, m.lora_a, m.lora_b, 0.5),
    "lora_add_": lambda m, x: lora_add_(x @ m.weight.t(), x, m.lora_a, m.lora_b, 0.5),
    "multi_lora_linear": lambda m, x: multi_lora_linear(
        x, m.weight, m.bias, [m.lora_a], [m.lora_b], torch.ones(1), m.plan
    ),
    "grouped_lora_linear": _grouped,
    "lora_embedding": lambda m, x: lora_embedding((x > 0).long(), m.weight.t(), m.lora_a, m.lora_b, 0.5),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_traced_op_can_be_saved(name, grad):
    module, x = _Call(CALLS[name]), torch.randn(4, 16)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded, other = torch.jit.load(file), torch.randn(4, 16)
    torch.testing.assert_close(loaded(other), module(other))


@pytest.mark.parametrize("active", [["default"], ["default", "b"]])
def test_a_traced_model(active):
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    config = lk.LoraConfig(r=2, target_modules=["0", "1", "3"], init_lora_weights=False)
    model = lk.get_peft_model(model, config)
    model.add_adapter("b", config)
    model.base_model.set_adapter(active)
    ids = torch.randint(0, 10, (2, 3))
    traced = torch.jit.trace(model.base_model.model, (ids,))
    torch.testing.assert_close(traced(ids + 1 - ids), model(ids + 1 - ids))
