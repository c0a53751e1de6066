"""The sequences of ``test_oracle`` on a language model: trained rows of its embedding, and weights that are tied."""

import warnings

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from layers.lm import Decoder
from model.models import token_ids

import lora_kernels as lk
from oracle.test_oracle import NAMES, SETTINGS, Oracle, close

peft = pytest.importorskip("peft")

ROWS = [[1, 3], [0, 5, 9], [2], [3, 4], [12, 10]]
CONFIGS = st.fixed_dictionaries(
    {"r": st.integers(1, 4), "lora_alpha": st.sampled_from([1, 6]), "target_modules": st.just(["q_proj"])}
)


class OracleOfTokens(Oracle):
    """Two models, one call at a time."""

    @initialize(config=CONFIGS, seed=st.integers(0, 9), beside=st.sampled_from(["rows", "rows of both", "copy", "tie"]),
                tied=st.booleans(), rows=st.sampled_from(ROWS))  # fmt: skip
    def start(self, config, seed, beside, tied, rows):
        # DIFFERENCES: merging into a tied weight, and tied factors; rows of two tied layers are never drawn apart
        self.pair, self.beside, self.tied = [], beside, beside == "tie" or (tied and beside != "copy")
        for package in (peft, lk):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config_of = package.LoraConfig(**self.filled(config, rows))
                self.pair.append(package.get_peft_model(Decoder(self.tied), config_of).eval())
        self.learn()

    def filled(self, config, rows):
        """The fields of a config with what this sequence trains beside."""
        if self.beside == "rows":
            return {**config, "trainable_token_indices": rows}
        if self.beside == "rows of both":
            return {**config, "trainable_token_indices": {"embed_tokens": rows, "lm_head": rows}}
        if self.beside == "copy":
            return {**config, "modules_to_save": ["lm_head"]}
        return {**config, "target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True}

    def learn(self):
        """The same new values in both."""
        super().learn()
        for (name, ours), (_, theirs) in zip(*(sorted(model.named_parameters()) for model in self.pair), strict=True):
            if "trainable_tokens" in name:
                theirs.data = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(len(name)))
                ours.data = theirs.data.clone()

    @precondition(lambda self: self.beside != "tie")  # DIFFERENCES: PEFT ties no further adapter
    @rule(name=st.sampled_from(NAMES), config=CONFIGS, rows=st.sampled_from(ROWS))
    def add(self, name, config, rows):
        known = set(self.pair[1].peft_config)
        self.each(lambda model, package: model.add_adapter(name, package.LoraConfig(**self.filled(config, rows))))
        if name not in known and not self.merged():
            self.learn()

    @precondition(lambda self: not self.tied)
    @rule(safe=st.booleans())
    def merge_and_unmerge(self, safe):
        super().merge_and_unmerge(safe)

    @precondition(lambda self: self.beside.startswith("rows"))
    @rule(names=st.lists(st.sampled_from([*NAMES, "__base__", "unknown"]), min_size=3, max_size=3))
    def mixed(self, names):
        found = self.each(lambda model, package: model(token_ids(), adapter_names=names))
        if found[0][0] == "result":
            close(found[0][1], found[1][1])

    def weighted(self):
        """Not of these: PEFT sums neither rows nor copies."""

    def teardown(self):
        if not self.tied:
            super().teardown()


del Oracle
TestOracleOfTokens = OracleOfTokens.TestCase
TestOracleOfTokens.settings = settings(SETTINGS, stateful_step_count=10, max_examples=16)
