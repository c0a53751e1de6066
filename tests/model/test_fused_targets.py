"""Experts and routers that transformers 5 has fused, named as before: the same targets, config and files as PEFT's."""

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_kernels as lk

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers", minversion="5")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
IDS = torch.arange(12).view(2, 6)


def base(kind):
    torch.manual_seed(0)
    if kind == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4)).eval()
    sizes = {**SIZES, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)).eval()


def pair(kind, fields):
    """peft's and our model with the same adapter, and the configs."""
    made = []
    for package in (peft, lk):
        config = package.LoraConfig(r=2, lora_alpha=3, **fields)
        made += [package.get_peft_model(base(kind), config).eval(), config]
    theirs, their_config, ours, our_config = made
    generator = torch.Generator().manual_seed(1)
    state = {
        key: torch.randn(value.shape, generator=generator) * 0.2 if "lora_" in key else value
        for key, value in theirs.state_dict().items()
    }
    for model in (theirs, ours):
        model.load_state_dict(state)
    return theirs, their_config, ours, our_config


CASES = [
    ("qwen", {"target_modules": "all-linear"}),
    ("qwen", {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
    (
        "qwen",
        {"target_modules": ["mlp.gate", "v_proj"], "target_parameters": ["down_proj"], "rank_pattern": {"v_proj": 3}},
    ),
    ("qwen", {"target_modules": r".*\.(q_proj|k_proj|gate_proj|up_proj)"}),
    ("qwen", {"target_modules": r"model\.layers\.1\..*\.q_proj"}),
    ("mixtral", {"target_modules": "all-linear"}),
    ("mixtral", {"target_modules": ["w1", "w2", "w3", "gate"]}),
    ("mixtral", {"target_modules": r".*\.(o_proj|w1|w3)"}),
    ("mixtral", {"target_modules": ["q_proj", "gate_proj"]}),
]


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_the_same_targets_and_outputs(kind, fields, tmp_path):
    theirs, their_config, ours, our_config = pair(kind, fields)
    for name in ("target_modules", "rank_pattern", "alpha_pattern"):
        assert getattr(our_config, name) == getattr(their_config, name), name
    assert set(our_config.target_parameters or ()) == set(their_config.target_parameters or ())
    assert set(ours.targeted_parameter_names) == set(theirs.targeted_parameter_names)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["rank_pattern"] == their_config.rank_pattern
    for package in (peft, lk):
        loaded = package.PeftModel.from_pretrained(base(kind), str(tmp_path))
        with torch.no_grad():
            torch.testing.assert_close(loaded(IDS).logits, ours(IDS).logits)


@pytest.mark.parametrize("targets", [["w1", "q_proj"], r".*\.w3"])
def test_a_part_of_what_is_fused_is_refused_as_in_peft(targets):
    for package in (peft, lk):
        model = base("mixtral")
        before = [name for name, _ in model.named_modules()]
        with pytest.raises(ValueError, match=r"Cannot convert PEFT target\(s\) w\d without also targeting w\d because"):
            package.get_peft_model(model, package.LoraConfig(target_modules=targets))
        assert [name for name, _ in model.named_modules()] == before


def test_default_targets_of_a_mixture_where_peft_finds_none():
    with pytest.raises(ValueError, match="No `target_modules` passed"):
        peft.get_peft_model(base("mixtral"), peft.LoraConfig())
    model = lk.get_peft_model(base("mixtral"), lk.LoraConfig())
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == {"q_proj", "v_proj"}


def test_the_callers_patterns_are_not_written_to():
    patterns = {"q_proj": 3}
    config = lk.LoraConfig(target_modules=["w1", "w3"], rank_pattern=patterns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lk.get_peft_model(base("mixtral"), config)
    assert patterns == {"q_proj": 3}
    assert config.rank_pattern[rf".*\.{re.escape('gate_up_proj')}"] == 16


def written_before(kind, folder, projections, r=2):
    """An adapter of the model as transformers 4 had it: each projection of each expert on its own."""
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    width, generator = 32 if kind == "mixtral" else 16, torch.Generator().manual_seed(3)
    tensors = {}

    def add(path, inner, outer):
        for key, shape in ((f"{path}.lora_A.weight", (r, inner)), (f"{path}.lora_B.weight", (outer, r))):
            tensors[f"base_model.model.model.layers.{key}"] = torch.randn(shape, generator=generator) * 0.3

    for layer in range(2):
        for name in projections:
            if name == "gate":
                add(f"{layer}.{block}.gate", 16, 4)
            elif name == "q_proj":
                add(f"{layer}.self_attn.q_proj", 16, base(kind).model.layers[0].self_attn.q_proj.out_features)
            else:
                down = name in ("w2", "down_proj")
                for expert in range(4):
                    sizes = (width, 16) if down else (16, width)
                    add(f"{layer}.{block}.experts.{expert}.{name}", *sizes)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 3, "target_modules": list(projections)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "projections"),
    [
        ("mixtral", ("w1", "w2", "w3", "gate", "q_proj")),
        ("qwen", ("gate_proj", "up_proj", "down_proj", "gate", "q_proj")),
        ("qwen", ("down_proj", "q_proj")),
    ],
)
def test_adapters_written_before_experts_were_fused_are_loaded_as_in_peft(kind, projections, tmp_path):
    written_before(kind, tmp_path, projections)
    theirs, ours = (package.PeftModel.from_pretrained(base(kind), str(tmp_path)).eval() for package in (peft, lk))
    state = ours.state_dict()
    for key, value in theirs.state_dict().items():
        assert torch.equal(state[key], value), key
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)
        assert not torch.allclose(ours(IDS).logits, base(kind)(IDS).logits, atol=1e-3)
    assert not lk.get_peft_model(base(kind), lk.LoraConfig(target_modules=["q_proj"])).load_adapter(tmp_path, "b")[1]


def test_an_expert_without_its_tensors_is_named(tmp_path):
    written_before("mixtral", tmp_path, ("w1", "w2", "w3"))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.block_sparse_moe.experts.2.w3.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(lk.io.checkpoint.CheckpointError, match=r"missing .*layers\.\d\.mlp\.experts"):
        lk.PeftModel.from_pretrained(base("mixtral"), tmp_path)
