"""The same random calls through ``peft`` and through us, on a model of many kinds of layers.

Embedding, convolution, a transposed linear layer, attention and a plain head; biases that train, modules saved in full,
DoRA; saving and loading within the sequence.
"""

import tempfile
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn

import lora_kernels as lk

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

NAMES = ["default", "b", "c"]
TARGETS = [["embed", "conv"], ["conv", "trans"], ["embed", "lin"], ["lin", "head"], ["trans"], ["conv", "lin", "trans"]]
CONFIGS = st.fixed_dictionaries(
    {
        "r": st.sampled_from([2, 4]),
        "lora_alpha": st.sampled_from([2, 7]),
        "target_modules": st.sampled_from(TARGETS),
        "modules_to_save": st.sampled_from([None, None, ["norm"]]),
        "bias": st.sampled_from(["none", "none", "none", "all", "lora_only"]),
        "use_dora": st.sampled_from([False, False, False, True]),
        "alpha_pattern": st.sampled_from([{}, {"conv": 5}]),
    }
)


class Kinds(nn.Module):
    """Token ids (batch, 6) -> (batch, 6, 5)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.trans = transformers.pytorch_utils.Conv1D(8, 8)
        self.norm = nn.LayerNorm(8)
        self.lin = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(self.lin(self.norm(self.trans(x)))))


def base():
    torch.manual_seed(4)
    return Kinds().eval()


def ids():
    return torch.randint(0, 9, (3, 6), generator=torch.Generator().manual_seed(2))


class KindsOracle(RuleBasedStateMachine):
    """Two models, one call at a time."""

    @initialize(config=CONFIGS)
    def start(self, config):
        self.pair = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for package in (peft, lk):
                self.pair.append(package.get_peft_model(base(), package.LoraConfig(**config)).eval())
        self.learn()

    def learn(self):
        """The same new values in both."""
        values, generator = {}, torch.Generator().manual_seed(len(self.pair[0].peft_config))
        for model in self.pair:
            for name, parameter in sorted(model.named_parameters()):
                if "lora_" in name or "modules_to_save" in name:
                    if name not in values:
                        values[name] = torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1
                    parameter.data = values[name].clone()

    def configs(self):
        return self.pair[1].peft_config

    def merged(self):
        return any(layer.merged for layer in self.pair[1].base_model.lora_layers())

    def each(self, call):
        """Runs ``call(model, package)`` on both: equal results, or errors of one kind."""
        found = []
        for model, package in zip(self.pair, (peft, lk), strict=True):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found.append(("result", call(model, package)))
            except Exception as error:
                found.append(("error", error))
        assert found[0][0] == found[1][0], found
        if found[0][0] == "error":
            assert isinstance(found[1][1], type(found[0][1])) or type(found[0][1]) in type(found[1][1]).__mro__, found
        return found

    @rule(name=st.sampled_from(NAMES), config=CONFIGS)
    def add(self, name, config):
        if self.merged():
            return
        found = self.each(lambda model, package: model.add_adapter(name, package.LoraConfig(**config)))
        if found[0][0] == "result":
            self.learn()

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True))
    def choose(self, names):
        names = [name for name in names if name in self.configs()]  # DIFFERENCES: PEFT accepts unknown names
        dora = any(self.configs()[name].use_dora for name in names)
        if names and not (dora and len(names) > 1):
            self.each(lambda model, package: model.base_model.set_adapter(names))

    @rule(safe=st.booleans(), twice=st.booleans())
    def merge(self, safe, twice):
        self.each(lambda model, package: model.merge_adapter(safe_merge=safe))
        if twice:
            self.each(lambda model, package: model.merge_adapter())
        self.agree()
        if not safe:
            self.each(lambda model, package: model.unmerge_adapter())

    @rule()
    def unmerge(self):
        self.each(lambda model, package: model.unmerge_adapter())

    @rule(name=st.sampled_from([*NAMES, "unknown"]))
    def delete(self, name):
        if name in self.pair[1].active_adapters and len(self.pair[1].active_adapters) == 1:
            return  # which adapter is active then depends, in PEFT, on the layer that comes first
        self.each(lambda model, package: model.delete_adapter(name))

    @rule(name=st.sampled_from(NAMES))
    def updates(self, name):
        if name not in self.configs() or self.configs()[name].use_dora:
            return
        theirs = dict(self.pair[0].named_modules())
        for path, layer in self.pair[1].named_modules():
            if isinstance(layer, lk.tuners.lora.LoraLayer) and name in layer.r:
                close(theirs[path].get_delta_weight(name), layer.get_delta_weight(name))

    @rule()
    def disabled(self):
        if self.merged():
            return  # DIFFERENCES: PEFT takes the merged update out for good

        def call(model, package):
            with model.disable_adapter():
                return model(ids())

        found = self.each(call)
        close(found[0][1], found[1][1])

    @rule(name=st.sampled_from(NAMES), other=st.sampled_from(["saved", "b"]))
    def save_and_load(self, name, other):
        """What each package saved, the other one loads."""
        if name not in self.configs() or self.merged() or other in self.configs():
            return
        if self.configs()[name].bias != "none":
            return  # a second adapter with biases is refused by both
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for model, package in zip(self.pair, (peft, lk), strict=True):
                model.save_pretrained(f"{folder}/{package.__name__}", selected_adapters=[name])
            below = "" if name == "default" else f"/{name}"
            for model, source in zip(self.pair, (lk, peft), strict=True):
                model.load_adapter(f"{folder}/{source.__name__}{below}", other)

    @rule(kind=st.sampled_from(["linear", "cat", "svd"]))
    def weighted(self, kind):
        # DIFFERENCES: PEFT leaves half an adapter behind after an error; DoRA and convolutions are not summed by it
        names = [n for n, c in self.configs().items() if not c.use_dora and "conv" not in c.target_modules][:2]
        configs = [self.configs()[name] for name in names]
        if len(names) < 2 or "sum" in self.configs() or any(c.modules_to_save or c.bias != "none" for c in configs):
            return
        if len({config.r for config in configs}) > 1 and kind == "linear":
            return
        self.each(lambda model, package: model.add_weighted_adapter(names, [1.5, 0.5], "sum", kind))
        self.updates("sum")
        self.each(lambda model, package: model.delete_adapter("sum"))

    @invariant()
    def agree(self):
        with torch.no_grad():
            close(*(model(ids()) for model in self.pair))
        theirs, ours = (vars(model.get_model_status()) for model in self.pair)
        for status in (theirs, ours):  # DIFFERENCES: leaving disable_adapter() changes what is trained in PEFT
            status.update(requires_grad=None, trainable_params=None)
        assert ours == theirs
        assert set(self.pair[0].state_dict()) == set(self.pair[1].state_dict())
        theirs, ours = (
            [(s.name, s.module_type, s.enabled, s.active_adapters, s.merged_adapters) for s in m.get_layer_status()]
            for m in self.pair
        )
        assert ours == theirs

    def teardown(self):
        if hasattr(self, "pair"):
            found = self.each(lambda model, package: model.merge_and_unload())
            if found[0][0] == "result":
                close(*(plain(ids()) for _, plain in found))


def close(theirs, ours):
    """Float32 of one formula in two orders of summing."""
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=5e-4)


TestKindsOracle = KindsOracle.TestCase
TestKindsOracle.settings = settings(
    max_examples=14,
    stateful_step_count=10,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
