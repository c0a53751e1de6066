"""A checkpoint merged on disk is the one that PEFT's merge of the loaded model gives, in the layout of the source."""

import json
import os
import struct

import pytest
import torch
from disk_cases import gpt2, llama, load_all, peft, save_adapter, save_base, transformers
from safetensors.torch import load_file, save_file

from lora_kernels.__main__ import main
from lora_kernels.disk import merge_checkpoint
from lora_kernels.testing import assert_within_budget


def peft_merged(make, dtype, adapters):
    """PEFT's merge of several adapters, one after the other (exact in float64 up to its own rounding)."""
    model = make(dtype)
    for path in adapters:
        model = peft.PeftModel.from_pretrained(model, path).to(dtype).merge_and_unload()
    return model.state_dict()


def header(path):
    data = path.read_bytes()
    return data[: 8 + struct.unpack("<Q", data[:8])[0]]


def check_layout(base, out):
    weights = [p.name for p in base.iterdir() if p.name.endswith(".safetensors")]
    for name in weights:
        assert header(base / name) == header(out / name)
        assert (base / name).stat().st_size == (out / name).stat().st_size
    for name in ("config.json", "tokenizer.json", "chat_templates/tool.jinja", "model.safetensors.index.json"):
        if (base / name).exists():
            assert (base / name).read_bytes() == (out / name).read_bytes()
    assert not (out / "pytorch_model.bin").exists()
    assert {p.name for p in out.iterdir()} == {p.name for p in base.iterdir()} - {"pytorch_model.bin"}


CASES = {
    "plain": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 12}),
    "rslora": (llama, {"target_modules": ["o_proj"], "r": 9, "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": "all-linear",
            "r": 3,
            "rank_pattern": {"q_proj": 5, r"layers\.1\..*down_proj": 7},
            "alpha_pattern": {"k_proj": 31},
        },
    ),
    "dora": (llama, {"target_modules": ["q_proj", "up_proj"], "r": 4, "use_dora": True}),
    "saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "k_proj"], "r": 4}),
    "embedding_dora": (llama, {"target_modules": ["embed_tokens"], "r": 4, "use_dora": True}),
    "bias": (
        lambda dtype: llama(dtype, attention_bias=True),
        {"target_modules": ["q_proj"], "bias": "all"},
    ),
    "lora_bias": (
        lambda dtype: llama(dtype, attention_bias=True),
        {"target_modules": ["q_proj"], "lora_bias": True, "r": 4, "lora_alpha": 12},
    ),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": 4}),
    "conv1d_dora": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "r": 4, "use_dora": True}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_same_as_peft(case, dtype, tmp_path):
    make, options = CASES[case]
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_base(make(dtype), base)
    save_adapter(make, adapter, **options)
    merge_checkpoint(base, [adapter], out, verify=True, quiet=True, block_bytes=512)
    check_layout(base, out)
    before, ours = load_all(base), load_all(out)
    eager = peft_merged(make, dtype, [adapter])
    # The checkpoint's values, in float64.
    exact = peft_merged(lambda d: make(dtype).to(d), torch.float64, [adapter])
    changed = 0
    for name, tensor in ours.items():
        assert tensor.dtype == dtype
        if torch.equal(exact[name], before[name].double()):
            assert torch.equal(tensor, before[name]), name
        else:
            changed += 1
            assert_within_budget(tensor, eager[name], exact[name], name)
    assert changed


def test_blocks_change_no_bit(tmp_path):
    save_base(llama(torch.bfloat16), tmp_path / "base")
    save_adapter(llama, tmp_path / "a", target_modules="all-linear", r=5)
    for i, block in enumerate((100, 4096, 1 << 22)):
        merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / f"out{i}", quiet=True, block_bytes=block)
    first = load_all(tmp_path / "out0")
    for i in (1, 2):
        assert all(torch.equal(first[n], t) for n, t in load_all(tmp_path / f"out{i}").items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_adapters_with_weights_round_once(dtype, tmp_path):
    save_base(llama(dtype), tmp_path / "base")
    save_adapter(llama, tmp_path / "a", 1, target_modules=["q_proj", "k_proj"], r=3)
    save_adapter(llama, tmp_path / "b", 2, target_modules=["q_proj", "o_proj"], r=6, lora_alpha=20)
    save_adapter(llama, tmp_path / "c", 3, target_modules=["q_proj"], r=4, use_dora=True)
    names, weights = ["a", "b", "c"], [0.5, -1.25, 0.7]
    merge_checkpoint(tmp_path / "base", [tmp_path / n for n in names], tmp_path / "out", weights=weights, quiet=True,
                     verify=True)  # fmt: skip
    before, ours = load_all(tmp_path / "base"), load_all(tmp_path / "out")
    exact = {n: t.double() for n, t in before.items()}
    for name, weight in zip(names, weights):
        alone = peft_merged(lambda d: llama(dtype).to(d), torch.float64, [tmp_path / name])
        for n, t in before.items():
            exact[n] = exact[n] + weight * (alone[n] - t.double())
    for n, t in ours.items():
        rounded = exact[n].to(dtype)
        assert (t.double() - exact[n]).abs().max() <= (rounded.double() - exact[n]).abs().max() * 1.01 + 1e-6


def rewrite(path, change):
    tensors = load_file(path)
    save_file(change(tensors), path, metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", ["", "wrapped.", "model."])
def test_prefixes_on_either_side(prefix, tmp_path):
    save_base(llama(torch.float32), tmp_path / "base", "1GB")
    save_adapter(llama, tmp_path / "a", target_modules=["q_proj"], r=4)
    merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "plain", quiet=True)
    file = tmp_path / "base" / "model.safetensors"
    rewrite(file, lambda ts: {(n.removeprefix("model.") if not prefix else prefix + n): t for n, t in ts.items()})
    merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "other", quiet=True)
    plain, other = load_all(tmp_path / "plain"), load_all(tmp_path / "other")
    for n, t in plain.items():
        assert torch.equal(t, other[n.removeprefix("model.") if not prefix else prefix + n])


def test_fused_checkpoint_split_adapter_and_the_reverse(tmp_path):
    parts = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def fuse(tensors):
        out = dict(tensors)
        for name in tensors:
            for fused, names in parts.items():
                if f".{names[0]}." in name:
                    whole = [out.pop(name.replace(names[0], part)) for part in names]
                    out[name.replace(names[0], fused)] = torch.cat(whole)
        return out

    save_base(llama(torch.bfloat16), tmp_path / "split", "1GB")
    save_base(llama(torch.bfloat16), tmp_path / "fused", "1GB")
    rewrite(tmp_path / "fused" / "model.safetensors", fuse)
    save_adapter(llama, tmp_path / "a", target_modules=["k_proj", "v_proj", "up_proj"], r=4)
    for kind in ("split", "fused"):
        merge_checkpoint(tmp_path / kind, [tmp_path / "a"], tmp_path / f"{kind}_out", quiet=True, verify=True)
    wanted = fuse(load_all(tmp_path / "split_out"))
    assert all(torch.equal(t, wanted[n]) for n, t in load_all(tmp_path / "fused_out").items())

    # The reverse: factors of the fused projection, on both checkpoints.
    config = {"peft_type": "LORA", "target_modules": ["qkv_proj"], "r": 4, "lora_alpha": 8}
    os.mkdir(tmp_path / "b")
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_{}.weight"
    factors = {key.format("A"): torch.randn(4, 48), key.format("B"): torch.randn(96, 4)}
    save_file(factors, tmp_path / "b" / "adapter_model.safetensors")
    for kind in ("split", "fused"):
        merge_checkpoint(tmp_path / kind, [tmp_path / "b"], tmp_path / f"{kind}_out2", quiet=True)
    wanted = fuse(load_all(tmp_path / "split_out2"))
    assert all(torch.equal(t, wanted[n]) for n, t in load_all(tmp_path / "fused_out2").items())


def test_convolutions(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.point, self.wide = torch.nn.Conv2d(6, 8, 1), torch.nn.Conv2d(8, 5, 3)
            self.line = torch.nn.Conv1d(5, 7, 2)

    torch.manual_seed(0)
    net = Net()
    os.mkdir(tmp_path / "base")
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    for dora in (False, True):
        model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["point", "wide", "line"], use_dora=dora))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.data.normal_(0, 0.3)
        model.save_pretrained(tmp_path / f"a{dora}")
        net = model.unload()
        merge_checkpoint(tmp_path / "base", [tmp_path / f"a{dora}"], tmp_path / f"out{dora}", quiet=True, verify=True)
        merged = peft.PeftModel.from_pretrained(Net(), tmp_path / f"a{dora}")
        merged.base_model.model.load_state_dict(
            {k: v for k, v in model.state_dict().items() if "lora" not in k}, strict=False
        )
        for name in ("point", "wide", "line"):
            layer = getattr(merged.base_model.model, name)
            layer.base_layer.load_state_dict({k: getattr(getattr(net, name), k).data for k in ("weight", "bias")})
        wanted = merged.merge_and_unload().state_dict()
        for name, tensor in load_all(tmp_path / f"out{dora}").items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)


def test_command_line(tmp_path, capsys):
    save_base(llama(torch.bfloat16), tmp_path / "base")
    save_adapter(llama, tmp_path / "a", target_modules=["q_proj"], r=4)
    arguments = [str(tmp_path / "base"), str(tmp_path / "a"), "-o", str(tmp_path / "out")]
    before = sorted(os.listdir(tmp_path))
    assert main(["merge", *arguments, "--dry-run"]) == 0
    assert sorted(os.listdir(tmp_path)) == before
    assert "nothing written" in capsys.readouterr().out
    assert main(["merge", *arguments, "--weights", "0.5", "--verify"]) == 0
    assert "verified" in capsys.readouterr().out
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert main(["merge", *arguments]) == 1
    assert "not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["merge", *arguments, "--weights", "much"])
