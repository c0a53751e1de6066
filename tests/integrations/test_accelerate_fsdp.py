"""``accelerate`` and FSDP, which shows its views of one flat parameter in the place of the parameters."""

import copy

import pytest
import torch
from accelerate_cases import batch, made, paths, same
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp

import lora_kernels as lk

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("config", [{}, {"lora_bias": True}, {"lora_dropout": 0.4}, {"use_dora": True}])
def test_layers_inside_of_fsdp_are_ours_and_give_the_bits_they_give_outside(config, monkeypatch):
    plain = made(**config)
    assert len(lk.accelerate(plain).replaced) == 3
    wrapped = Fsdp(copy.deepcopy(plain), use_orig_params=True, device_id="cpu")
    x, calls = batch(), paths(monkeypatch)
    for model in (plain, wrapped):
        torch.manual_seed(1)
        model.train()(x).square().sum().backward()
    grads = {name.replace("_fsdp_wrapped_module.", ""): p.grad for name, p in wrapped.named_parameters()}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            same(grads[name], parameter.grad)
    with torch.no_grad():
        assert torch.equal(wrapped.eval()(x), plain.eval()(x))
    assert not calls
