"""PiSSA and OLoRA adapters merged on disk: what they took out of the weight when they were made leaves it again."""

import json

import pytest
import torch
from disk_cases import gpt2, llama, load_all, peft, save_base
from safetensors.torch import load_file, save_file

import lora_kernels as lk
from lora_kernels.__main__ import main
from lora_kernels.disk import merge_checkpoint
from lora_kernels.io.checkpoint import CheckpointError
from lora_kernels.testing import assert_within_budget

WEIGHTS = "adapter_model.safetensors"


def train(make, path, init, **options):
    """The adapter ``a``, of which all was changed after the start; returns the model, as it was at ``initial``, too."""
    torch.manual_seed(1)
    model = peft.get_peft_model(make(torch.float32), peft.LoraConfig(init_lora_weights=init, **options))
    model.save_pretrained(path / "initial")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            change = 0.1 * torch.randn_like(parameter)
            parameter.data = parameter * (1 + change) if "magnitude" in name else parameter + change
    model.save_pretrained(path / "a")
    return model


def exactly(weight, a, b, scale, init, transposed):
    """The merged weight in float64."""
    weight, a, b = weight.double(), a.double(), b.double()
    weight = weight.t() if transposed else weight
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        rest = weight - scale * q[:, : len(a)] @ upper[: len(a)]
    else:
        u, s, vh = torch.linalg.svd(weight)
        rest = weight - u[:, : len(a)] @ s[: len(a)].diag() @ vh[: len(a)]
    merged = rest + scale * b @ a
    return merged.t() if transposed else merged


CASES = {
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 12}),
    "patterns": (
        llama,
        {"target_modules": ["k_proj", "up_proj"], "r": 3, "rank_pattern": {"k_proj": 5}, "use_rslora": True},
    ),
    "narrow": (llama, {"target_modules": ["k_proj"], "r": 30}),  # whose weight has 24 rows
    "parameter": (llama, {"target_modules": [], "target_parameters": ["k_proj.weight"], "r": 30}),
    "head": (llama, {"target_modules": ["q_proj", "lm_head"], "r": 4}),  # PEFT saves what is left of the head, too
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": 4}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("case", "init"),
    [
        ("linear", "pissa"),
        ("linear", "olora"),
        ("patterns", "pissa"),
        ("narrow", "olora"),
        ("parameter", "olora"),
        ("head", "pissa"),
        ("head", "olora"),
        ("conv1d", "pissa"),
    ],
)
def test_the_merge_of_the_loaded_model(case, init, dtype, tmp_path):
    make, options = CASES[case]
    save_base(make(dtype), tmp_path / "base")
    # As trained in the checkpoint's dtype.
    train(lambda d: make(dtype).to(d), tmp_path, init, **options)
    merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", verify=True, quiet=True, block_bytes=512)
    before, ours = load_all(tmp_path / "base"), load_all(tmp_path / "out")
    eager, in_model = (
        api.PeftModel.from_pretrained(make(dtype), tmp_path / "a").to(dtype).merge_and_unload().state_dict()
        for api in (peft, lk)
    )
    factors, changed = load_file(tmp_path / "a" / WEIGHTS), 0
    for name, tensor in ours.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in factors:
            assert torch.equal(tensor, before[name]), name
            continue
        a, b = (factors[f"{key}.lora_{kind}.weight"] for kind in "AB")
        rank = options["r"] if case in ("narrow", "parameter") else len(a)
        scale = options.get("lora_alpha", 8) / (rank**0.5 if options.get("use_rslora") else rank)
        exact = exactly(before[name], a, b, scale, init, "fan_in_fan_out" in options)
        assert_within_budget(tensor, eager[name], exact, name)
        assert_within_budget(tensor, in_model[name], exact, name)
        assert not torch.equal(tensor, before[name])
        changed += 1
    assert changed


def merged(path, name="out", adapters=("a",), base="base", **options):
    merge_checkpoint(path / base, [path / a for a in adapters], path / name, quiet=True, verify=True, **options)
    return load_all(path / name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_same_as_a_plain_adapter_made_of_it(init, tmp_path):
    save_base(llama(torch.float32), tmp_path / "base")
    model = train(llama, tmp_path, init, target_modules=["q_proj", "up_proj"], r=4)
    before = load_all(tmp_path / "base")
    for name, tensor in merged(tmp_path, "nothing", ["initial"]).items():  # not trained: no update
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    ours, plain = merged(tmp_path), merged(tmp_path, "plain_out", ["plain"])
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        {"target_modules": ["embed_tokens", "k_proj"]},
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    ],
    ids=["dora", "embedding", "parameter"],
)
def test_beside_other_features(options, tmp_path):
    save_base(llama(torch.float32), tmp_path / "base")
    train(llama, tmp_path, "pissa", r=4, lora_alpha=6, **options)
    in_model = lk.PeftModel.from_pretrained(llama(torch.float32), tmp_path / "a").merge_and_unload().state_dict()
    before, changed = load_all(tmp_path / "base"), 0
    for name, tensor in merged(tmp_path).items():
        changed += not torch.equal(tensor, before[name])
        torch.testing.assert_close(tensor, in_model[name], rtol=1e-5, atol=1e-6)
    assert changed == 2 * max(1, len(options["target_modules"])) - ("embed_tokens" in options["target_modules"])


@pytest.mark.filterwarnings("ignore")
def test_conv1d_with_dora(tmp_path):
    save_base(gpt2(torch.float32), tmp_path / "base")
    train(gpt2, tmp_path, "pissa", target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    in_model = lk.PeftModel.from_pretrained(gpt2(torch.float32), tmp_path / "a").merge_and_unload().state_dict()
    for name, tensor in merged(tmp_path).items():
        torch.testing.assert_close(tensor, in_model[name], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_weights_blocks_and_fused_projections(tmp_path):
    """Each of several adapters counts with its own change; a part of a fused tensor is decomposed alone."""
    save_base(llama(torch.float32), tmp_path / "base", "1GB")
    train(llama, tmp_path, "pissa", target_modules=["q_proj", "k_proj", "v_proj"], r=4)
    (tmp_path / "second").mkdir()
    train(llama, tmp_path / "second", "olora", target_modules=["q_proj"], r=3)
    before, one, two = (load_all(tmp_path / "base"), merged(tmp_path, "one"), merged(tmp_path, "two", ["second/a"]))
    both = merged(tmp_path, "both", ["a", "second/a"], weights=[0.5, -2.0])
    small = merged(tmp_path, "small", ["a", "second/a"], weights=[0.5, -2.0], block_bytes=200)
    for name, tensor in both.items():
        wanted = before[name] + 0.5 * (one[name] - before[name]) - 2.0 * (two[name] - before[name])
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(small[name], tensor)
    (tmp_path / "fused").mkdir()
    file = tmp_path / "fused" / "model.safetensors"
    head = "model.layers.{}.self_attn."
    parts = {head.format(i) + "qkv_proj.weight": fuse(before, head.format(i)) for i in range(2)}
    save_file(parts, file)
    for i, name in enumerate(parts):
        fused = merged(tmp_path, f"fused_out{i}", base="fused")
        assert torch.equal(fused[name], fuse(one, head.format(i)))


def fuse(tensors, head):
    return torch.cat([tensors[f"{head}{part}.weight"] for part in ("q_proj", "k_proj", "v_proj")])


def change(path, **config):
    path = path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def refused(path, match):
    with pytest.raises(CheckpointError, match=match):
        merge_checkpoint(path / "base", [path / "a"], path / "out", quiet=True)
    assert not list(path.glob("out*"))


@pytest.mark.filterwarnings("ignore")
def test_what_can_not_be_found_again(tmp_path, capsys):
    save_base(llama(torch.float32), tmp_path / "base", "1GB")
    train(llama, tmp_path, "pissa", target_modules=["q_proj"], r=4)
    around = ".*path_initial_model_for_weight_conversion"
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert "a part was in the base weight (pissa)" in capsys.readouterr().out
    change(tmp_path, init_lora_weights="pissa_niter_16")
    refused(tmp_path, f"'pissa_niter_16' took .* random numbers, and no checkpoint has their seed{around}")
    change(tmp_path, init_lora_weights="corda")
    refused(tmp_path, f"'corda' changes the base weights{around}")
    change(tmp_path, init_lora_weights="pissa")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file({n: torch.eye(*t.shape) if "1.self_attn.q_proj" in n else t for n, t in tensors.items()}, file)
    refused(tmp_path, f"singular values 4 and 5 are equal{around}")


@pytest.mark.filterwarnings("ignore")
def test_fused_when_trained_and_split_in_the_checkpoint(tmp_path):
    save_base(llama(torch.float32), tmp_path / "base", "1GB")
    train(llama, tmp_path, "pissa", target_modules=["q_proj"], r=4)
    file = tmp_path / "a" / WEIGHTS
    tensors = {key.replace("q_proj", "qkv_proj"): tensor for key, tensor in load_file(file).items()}
    save_file({k: torch.ones(96, 4) if "lora_B" in k else t for k, t in tensors.items()}, file)
    refused(tmp_path, "the checkpoint has it in several tensors.*path_initial_model_for_weight_conversion")
