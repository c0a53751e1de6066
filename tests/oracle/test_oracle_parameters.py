"""The sequences of ``test_oracle`` on a model with adapters of bare parameters."""

import warnings

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from model.models import Tiny
from torch import nn
from torch.nn import functional as F

import lora_kernels as lk
from lora_kernels.layers import parameter
from oracle.test_oracle import NAMES, SETTINGS, Oracle

peft = pytest.importorskip("peft")

CONFIGS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 3),
        "lora_alpha": st.sampled_from([1, 4]),
        "target_modules": st.sampled_from([[], [], ["q_proj"], ["head", "up"]]),
        "target_parameters": st.sampled_from([["up", "down"]] * 3 + [["experts.up"], None, ["down", "v_proj.weight"]]),
        "use_rslora": st.booleans(),
        "rank_pattern": st.sampled_from([{}, {"down": 3}]),
        "alpha_pattern": st.sampled_from([{}, {"experts.up": 7}]),
        "lora_dropout": st.sampled_from([0.0, 0.0, 0.0, 0.1]),
        "inference_mode": st.booleans(),
    }
)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 16) / 4)
        self.down = nn.Parameter(torch.randn(3, 16, 8) / 4)

    def forward(self, x):
        return torch.stack([F.linear(torch.tanh(F.linear(x, self.up[e])), self.down[e]) for e in range(2)]).sum(0)


def tiny(seed):
    torch.manual_seed(seed)
    model = Tiny()
    model.layers.insert(1, nn.Sequential())
    model.layers[1].experts = Experts()
    return model


class OracleOfParameters(Oracle):
    """Two models, one call at a time."""

    @initialize(config=CONFIGS, seed=st.integers(0, 9))
    def start(self, config, seed):
        self.pair, config = [], {**config, "lora_dropout": 0.0}
        if not config["target_modules"] and not config["target_parameters"]:
            config["target_parameters"] = ["up", "down"]
        if config["target_parameters"] is None and config["target_modules"] == []:
            config["target_modules"] = ["q_proj"]
        for package in (peft, lk):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.pair.append(package.get_peft_model(tiny(seed), package.LoraConfig(**config)).eval())
        self.learn()

    @rule(name=st.sampled_from(NAMES), config=CONFIGS)
    def add(self, name, config):
        known = set(self.pair[1].peft_config)
        self.each(lambda model, package: model.add_adapter(name, package.LoraConfig(**config)))
        if name not in known and not self.merged():
            self.learn()


@pytest.fixture(autouse=True, scope="module")
def nothing_is_small():
    before, parameter.SMALL = parameter.SMALL, 0
    yield
    parameter.SMALL = before


del Oracle
TestOracleOfParameters = OracleOfParameters.TestCase
TestOracleOfParameters.settings = settings(SETTINGS, stateful_step_count=10)
