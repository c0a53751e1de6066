"""Models inside of FSDP, which shows its views of one flat parameter in the place of the parameters."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp

import lora_kernels as lk

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.filterwarnings("ignore")]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.up, self.down = nn.Embedding(10, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.conv, self.attention = nn.Conv1d(8, 8, 3, padding=1), nn.MultiheadAttention(8, 2)

    def forward(self, ids):
        x = self.emb(ids)
        x = self.conv((x + self.down(torch.tanh(self.up(x)))).mT).mT
        return self.attention(x, x, x)[0]


IDS = torch.tensor([[1, 2, 3, 3], [0, 9, 8, 1]])


def made(targets, **fields):
    torch.manual_seed(0)
    return lk.get_peft_model(Net(), lk.LoraConfig(target_modules=targets, **fields))


@pytest.mark.parametrize(
    ("kinds", "dora"),
    [(["emb"], False), (["up", "down"], False), (["up", "conv"], True), (["conv"], False), (["attention"], False)],
)
def test_a_step_and_the_saved_adapter_equal_those_of_the_plain_model(kinds, dora):
    plain = made(kinds, init_lora_weights=False, use_dora=dora)
    wrapped = Fsdp(copy.deepcopy(plain), use_orig_params=True, device_id="cpu")
    for model in (plain, wrapped):
        model(IDS).square().sum().backward()
    torch.testing.assert_close(wrapped(IDS), plain(IDS))
    gradients = {name.replace("_fsdp_wrapped_module.", ""): p.grad for name, p in wrapped.named_parameters()}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
    loaded = made(kinds, use_dora=dora)
    lk.set_peft_model_state_dict(loaded, lk.get_peft_model_state_dict(wrapped))
    torch.testing.assert_close(loaded(IDS), plain(IDS))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_loaded_into_a_model_that_trains_none(bias):
    model = made(["up", "down"], bias=bias, init_lora_weights=False)
    with torch.no_grad():
        for module in (model.up.base_layer, model.conv if bias == "all" else model.down.base_layer):
            module.bias.fill_(1.23)
    state = lk.get_peft_model_state_dict(Fsdp(copy.deepcopy(model), use_orig_params=True, device_id="cpu"))
    loaded = made(["up", "down"])
    missing, unexpected = lk.set_peft_model_state_dict(loaded, state)
    assert not missing
    assert not unexpected
    assert torch.equal(loaded(IDS), model(IDS))
