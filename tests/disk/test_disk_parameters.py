"""``target_parameters`` merged on disk: the bits of the merge in the model, in whatever form the experts are stored."""

import json

import pytest
import torch
from disk_cases import load_all, mixture, peft, save_adapter
from safetensors.torch import load_file, save_file

import lora_kernels as lk
from lora_kernels.__main__ import main
from lora_kernels.disk import merge_checkpoint
from lora_kernels.io.checkpoint import CheckpointError
from lora_kernels.testing import assert_within_budget

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    "mixtral": ("mixtral", True, {"target_parameters": BOTH, "r": 3, "lora_alpha": 7}),
    "mixtral fused": ("mixtral", False, {"target_parameters": BOTH, "r": 3, "lora_alpha": 7}),
    "mixtral router": (
        "mixtral",
        True,
        {"target_parameters": ["gate.weight", "down_proj"], "target_modules": ["q_proj"], "r": 2},
    ),
    "mixtral by its older names": ("mixtral", True, {"target_modules": ["w1", "w2", "w3", "q_proj"], "r": 2}),
    "qwen": ("qwen", True, {"target_parameters": ["gate_up_proj"], "target_modules": ["o_proj"], "r": 2}),
    "gpt_oss": (
        "gpt_oss",
        True,
        {"target_parameters": [*BOTH, "gate_up_proj_bias"], "r": 2, "rank_pattern": {"experts.down_proj": 5}},
    ),
    "gpt_oss square": ("gpt_oss", True, {"target_parameters": ["down_proj"], "r": 3, "use_rslora": True}),
    "llama4": ("llama4", True, {"target_parameters": BOTH, "r": 3, "alpha_pattern": {".*down_proj": 31}}),
}


def save(model, path, original=True):
    model.save_pretrained(path, max_shard_size="12KB", save_original_format=original)
    return load_all(path)


def adapter(path, kind, **options):
    save_adapter(lambda dtype: mixture(kind, dtype), path, **{"target_modules": [], **options})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_bits_of_the_merge_in_the_model(case, dtype, tmp_path):
    kind, original, options = CASES[case]
    before = save(mixture(kind, dtype), tmp_path / "base", original)
    adapter(tmp_path / "a", kind, **options)
    merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", verify=True, quiet=True, block_bytes=300)
    ours = load_all(tmp_path / "out")
    in_model = lk.PeftModel.from_pretrained(mixture(kind, dtype), tmp_path / "a").merge_and_unload()
    in_model = save(in_model, tmp_path / "in_model", original)
    eager, exact = (
        save(peft.PeftModel.from_pretrained(mixture(kind, dtype).to(d), tmp_path / "a").to(d).merge_and_unload(),
             tmp_path / str(d), original)
        for d in (dtype, torch.float64)
    )  # fmt: skip
    assert ours.keys() == before.keys()
    changed = 0
    for name, tensor in ours.items():
        assert torch.equal(tensor, in_model[name]), name
        changed += not torch.equal(tensor, before[name])
        if torch.equal(exact[name], before[name].double()):
            assert torch.equal(tensor, before[name]), name
        else:
            assert_within_budget(tensor, eager[name], exact[name], name)
    assert changed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_several_adapters_with_weights(kind, tmp_path):
    before = save(mixture(kind), tmp_path / "base")
    adapter(tmp_path / "a", kind, target_parameters=BOTH, r=3)
    save_adapter(lambda dtype: mixture(kind, dtype), tmp_path / "b", 2, target_modules=[], target_parameters=BOTH, r=2)
    paths, weights = [tmp_path / "a", tmp_path / "b"], [0.5, -1.25]
    merge_checkpoint(tmp_path / "base", paths, tmp_path / "out", weights=weights, quiet=True, verify=True)
    wanted = dict(before)
    for path, weight in zip(paths, weights):
        merge_checkpoint(tmp_path / "base", [path], tmp_path / "alone" / path.name, quiet=True)
        alone = load_all(tmp_path / "alone" / path.name)
        wanted = {n: t + weight * (alone[n].double() - before[n].double()) for n, t in wanted.items()}
    for name, tensor in load_all(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), wanted[name].double(), rtol=1e-6, atol=1e-6)


class Experts(torch.nn.Module):
    """Stacks that shapes do not tell apart (``w1``, ``v1``), and square ones (``square``)."""

    def __init__(self):
        super().__init__()
        self.w1, self.v1 = (torch.nn.Parameter(torch.randn(2, 6, 4)) for _ in range(2))
        self.square = torch.nn.Parameter(torch.randn(2, 4, 4))
        self.vector = torch.nn.Parameter(torch.randn(2, 4, 4, 4))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()


def save_net(path, names, **options):
    torch.manual_seed(0)
    (path / "base").mkdir()
    save_file(Net().state_dict(), path / "base" / "model.safetensors")
    config = peft.LoraConfig(target_modules=[], target_parameters=names, **options)
    peft.get_peft_model(Net(), config).save_pretrained(path / "a")


def refused(path, match):
    with pytest.raises(CheckpointError, match=match):
        merge_checkpoint(path / "base", [path / "a"], path / "out", quiet=True)
    assert not list(path.glob("out*"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("names", "match"),
    [(["experts.w1", "experts.v1"], "same shapes.*merge_and_unload"), (["square"], "square, and the model_type")],
)
def test_what_the_files_leave_open(names, match, tmp_path):
    save_net(tmp_path, names)
    refused(tmp_path, match)


def rename(old, new):
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def resize(tensors):
    return {key: torch.ones(6, 5) if "lora_A" in key else tensor for key, tensor in tensors.items()}


EDITS = {
    "no such module": (rename("experts", "expert"), {}, "no tensor 'expert.w1'.*nearest: experts.w1"),
    "shape": (resize, {}, r"lora_A \(6, 5\).* do not fit 'experts.w1' \(2 of 6 × 4\)"),
    "rank": (None, {"r": 5}, "do not fit .* with r and rank_pattern"),
    "depth": (rename("experts.", "experts.base_layer."), {}, "one around another"),
    "half": (lambda ts: {k: t for k, t in ts.items() if "lora_A" in k}, {}, "lora_B is missing"),
    "bias": (lambda ts: {**ts, "base_model.model.experts.lora_B.bias": torch.ones(6)}, {}, "lora_B.bias of a bare"),
    "pissa": (None, {"init_lora_weights": "pissa"}, "needs a matrix in one tensor"),
    "dimensions": (None, {"target_parameters": ["vector"]}, "expected two or three dimensions"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", EDITS)
def test_what_does_not_fit(case, tmp_path):
    edit, config, match = EDITS[case]
    save_net(tmp_path, ["experts.w1"], r=3)
    file = tmp_path / "a" / "adapter_model.safetensors"
    if edit:
        save_file(edit(load_file(file)), file)
    names = {"target_parameters": ["expert.w1"]} if case == "no such module" else {}
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config, **names}))
    refused(tmp_path, match)


@pytest.mark.filterwarnings("ignore")
def test_experts_that_are_missing_or_quantised(tmp_path):
    tensors = save(mixture("mixtral"), tmp_path / "whole")
    adapter(tmp_path / "a", "mixtral", target_parameters=BOTH, r=3)
    (tmp_path / "base").mkdir()
    file = tmp_path / "base" / "model.safetensors"
    save_file({n: t for n, t in tensors.items() if "experts.2." not in n}, file)
    refused(tmp_path, r"do not fit .*\(2 of 48 × 16\)")
    save_file({n: t.to(torch.float8_e4m3fn) if ".w1." in n else t for n, t in tensors.items()}, file)
    refused(tmp_path, "w1.weight' is F8_E4M3: only")
    save_file({n: t[:-1] if "experts.1.w3." in n else t for n, t in tensors.items()}, file)
    refused(tmp_path, "expert 1 has weights of other shapes")


@pytest.mark.filterwarnings("ignore")
def test_inspect(tmp_path, capsys):
    adapter(tmp_path, "gpt_oss", target_parameters=BOTH, r=3, lora_alpha=6)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    merged = lk.PeftModel.from_pretrained(mixture("gpt_oss"), tmp_path)
    wanted = [
        layer.get_delta_weight("default").norm().item()
        for layer in merged.base_model.lora_layers()
    ]  # fmt: skip
    norms = [module["update_norm"] for module in facts["modules"]]
    assert sorted(norms) == pytest.approx(sorted(wanted), rel=1e-5)
    assert {m["rank"] for m in facts["modules"]} == {3}
    assert facts["modules"][0]["parameters_named"] == ["gate_up_proj", "down_proj"]
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {"down_proj": 2}}))
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "model.layers.*.mlp.experts.gate_up_proj|down_proj" in text
    assert "?" in text
