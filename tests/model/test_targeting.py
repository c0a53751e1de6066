"""Which modules are adapted: PEFT's answer, and errors that name what was likely meant."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.config import LoraConfig
from lora_kernels.model import get_peft_model
from lora_kernels.targeting import DEFAULT_TARGETS, find_targets

from .models import Tiny, tiny

peft = pytest.importorskip("peft")


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(3)),
                                                         "mlp": nn.ModuleDict({"up": nn.Linear(4, 4)})})
                                          for _ in range(3))  # fmt: skip
        self.h = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4), "mlp.up".replace(".", "_"): nn.Linear(4, 4)})
                               for _ in range(2))  # fmt: skip
        self.up = nn.Linear(4, 4)


CASES = [
    {"target_modules": ["up"]},
    {"target_modules": ["mlp.up"]},
    {"target_modules": ["up", "model.layers.1.experts.2"], "layers_to_transform": [0]},
    {"target_modules": ["up"], "layers_to_transform": 1},
    {"target_modules": ["up"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["0", "2"], "layers_to_transform": [1]},
    {"target_modules": r".*layers\.[01]\..*up"},
    {"target_modules": r".*up", "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["up"], "exclude_modules": ["mlp.up"]},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["up"]},
    {"target_modules": ["up"], "modules_to_save": ["mlp.up"]},
    {"target_modules": ["up"], "rank_pattern": {"mlp.up": 3, "up": 2}, "alpha_pattern": {r"layers\.0.*": 5}},
    {"target_modules": ["up"], "rank_pattern": {r"h\.\d\.up": 5}},
]


@pytest.mark.parametrize("values", CASES)
@pytest.mark.filterwarnings("ignore")
def test_targets_ranks_and_scalings_equal_those_of_peft(values):
    theirs = peft.get_peft_model(Nested(), peft.LoraConfig(**values))
    ours = get_peft_model(Nested(), LoraConfig(**values))
    state = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == state
    for name, module in theirs.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            assert ours.get_submodule(name).scaling == module.scaling


def test_default_targets_are_those_of_peft():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as theirs

    assert {k: sorted(v) for k, v in DEFAULT_TARGETS.items()} == {k: sorted(v) for k, v in theirs.items()}


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_transformers_model(targets):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**size, vocab_size=50, num_labels=3)
    make = transformers.BertForSequenceClassification
    values = {"target_modules": targets, "task_type": "SEQ_CLS"}
    torch.manual_seed(0)
    model = make(config)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**values))
    ours = get_peft_model(model, LoraConfig(**values))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    out = ours(input_ids=torch.ones(2, 3, dtype=torch.long), labels=torch.tensor([0, 1]))
    assert out.logits.shape == (2, 3)
    out.loss.backward()


def test_unknown_targets_name_the_closest():
    model = tiny()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"q_prj.*closest.*q_proj"):
        get_peft_model(model, LoraConfig(target_modules=["q_prj"]))
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["norm"]}, "LayerNorm"),
        ({"target_modules": "("}, "regular expression"),
        ({"target_modules": ["q_proj"], "exclude_modules": "["}, "regular expression"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"(": 3}}, "regular expression"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, "layers_to_transform"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "left out"),
        ({"target_modules": ["head"], "modules_to_save": ["layers"]}, "ModuleList"),
    ],
)
def test_bad_targets_are_named_and_nothing_changes(values, message):
    model = tiny()
    before = list(model.named_modules())
    with pytest.raises(TypeError if message == "ModuleList" else ValueError, match=message):
        get_peft_model(model, LoraConfig(**values))
    assert list(model.named_modules()) == before


def test_half_matched_names_warn_with_the_closest():
    with pytest.warns(RuntimeWarning, match="v_prj.*Closest.*v_proj"):
        find_targets(tiny(), LoraConfig(target_modules=["q_proj", "v_prj"]))


def test_failure_in_the_middle_of_wrapping_restores_the_model(monkeypatch):
    from lora_kernels.layers import LoraLinear

    model = tiny()
    before = list(model.named_modules())
    calls = []

    def fail(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make(self, *args)

    make = LoraLinear._make_adapter
    monkeypatch.setattr(LoraLinear, "_make_adapter", fail)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert list(model.named_modules()) == before


def test_attention_that_does_not_call_its_projection_is_refused():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="MultiheadAttention"):
        get_peft_model(nn.Sequential(attention), LoraConfig(target_modules=["out_proj"]))


def test_other_model_types_are_refused():
    with pytest.raises(TypeError, match="peft_config"):
        get_peft_model(Tiny(), {"r": 3})
    with pytest.raises(TypeError, match="model"):
        get_peft_model("model", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError, match="mixed"):
        get_peft_model(Tiny(), LoraConfig(target_modules=["q_proj"]), mixed=True)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ".*", "exclude_modules": ".*"},
        {"target_modules": ["head"], "modules_to_save": ["head"]},
        {"target_modules": ["head"], "modules_to_save": ["layers"]},
    ],
)
def test_exclusions_and_containers_are_refused_with_pefts_kind_of_error(config):
    errors = []
    for package in (lk, peft):
        with pytest.raises((ValueError, TypeError)) as caught:
            package.get_peft_model(tiny(), package.LoraConfig(**config))
        errors.append(caught.value)
    ours, theirs = errors
    assert isinstance(ours, TypeError) == isinstance(theirs, TypeError)
    assert str(ours)[:40] == str(theirs)[:40]


class WithAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


def test_all_linear_of_peft_with_an_attention_is_loaded_without_what_takes_no_part(tmp_path):
    torch.manual_seed(0)
    model, x = WithAttention().eval(), torch.randn(2, 3, 8)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules="all-linear")).eval()
    for name, parameter in theirs.named_parameters():  # the adapter of the projection is there, and nothing trains it
        if "lora_" in name and "out_proj" not in name:
            nn.init.normal_(parameter)
    wanted = theirs(x)
    wanted.sum().backward()
    assert [name for name, p in theirs.named_parameters() if "out_proj.lora_" in name and p.grad is None]
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="nn.MultiheadAttention uses them without calling") as caught:
        ours = lk.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert len(caught) == 1
    torch.testing.assert_close(ours(x), wanted)
    pool = lk.AdapterPool(copy.deepcopy(model), num_slots=1, max_rank=2)
    pool.register("a", tmp_path)
    with torch.no_grad(), pool.batch(["a", None]):
        y = pool.model(x)
    torch.testing.assert_close(y, torch.stack([wanted[0].detach(), model(x)[1]]))


def test_what_mamba_reads_without_calling_is_refused_as_in_peft():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, state_size=4)
    for package in (lk, peft):
        with pytest.raises(ValueError, match="Module 'out_proj' is incompatible with Mamba-based models"):
            package.get_peft_model(
                transformers.MambaForCausalLM(config), package.LoraConfig(target_modules=["out_proj"])
            )
    get_peft_model(transformers.MambaForCausalLM(config), LoraConfig(target_modules=["in_proj"]))
