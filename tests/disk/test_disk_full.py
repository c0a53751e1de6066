"""Tensors saved in full: what PEFT's merge of the loaded model saves, under whatever names the checkpoint has them."""

import shutil

import pytest
import torch
from disk_cases import llama, load_all, mixture, peft, save_adapter, save_base, transformers
from safetensors.torch import load_file, save_file

from lora_kernels.disk import merge_checkpoint
from lora_kernels.disk.inspect import describe
from lora_kernels.io.checkpoint import CheckpointError

WEIGHTS = "adapter_model.safetensors"


def biased(dtype):
    return llama(dtype, attention_bias=True)


def vit(dtype):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).to(dtype)


def bert(dtype):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=20)).to(dtype)


def swin(dtype):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    return transformers.SwinForImageClassification(transformers.SwinConfig(**sizes)).to(dtype)


def segformer(dtype):
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 16, 16, 16], "num_attention_heads": [1, 2, 2, 2], "depths": [1, 1, 1, 1]}
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**sizes)).to(dtype)


def neox(dtype):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, vocab_size=20)).to(dtype)


def mixtral(dtype):
    return mixture("mixtral", dtype)


def qwen(dtype):
    return mixture("qwen", dtype)


CASES = {
    "all biases and modules": (biased, ["q_proj"], {"bias": "all", "modules_to_save": ["o_proj", "norm"]}),
    "ViT, all biases": (vit, ["q_proj"], {"bias": "all", "modules_to_save": ["classifier"]}),
    "ViT, renamed": (vit, ["o_proj", "fc2"], {"modules_to_save": ["k_proj", "fc1", "layernorm_before"]}),
    "all biases, modules of several": (bert, ["query"], {"bias": "all", "modules_to_save": ["pooler", "classifier"]}),
    "Swin, renamed": (swin, ["v_proj", "o_proj"], {"modules_to_save": ["fc1", "classifier"]}),
    "SegFormer, renamed": (
        segformer,
        ["q_proj", "fc2"],
        {"modules_to_save": ["layernorm_before", "patch_embeddings", "decode_head"]},
    ),
    "GPT-NeoX head": (neox, ["query_key_value"], {"modules_to_save": ["lm_head"]}),
    "Mixtral router": (mixtral, ["q_proj"], {"modules_to_save": ["gate"]}),
    "Mixtral experts": (mixtral, ["q_proj"], {"modules_to_save": ["experts"]}),
    "Qwen block": (qwen, ["q_proj"], {"modules_to_save": ["mlp"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_same_as_peft(case, dtype, tmp_path):
    make, targets, options = CASES[case]
    base, out = tmp_path / "base", tmp_path / "out"
    save_base(make(dtype), base)
    save_adapter(make, tmp_path / "a", target_modules=targets, r=4, **options)
    merge_checkpoint(base, [tmp_path / "a"], out, quiet=True, verify=True, block_bytes=100)
    merged = peft.PeftModel.from_pretrained(type(make(dtype)).from_pretrained(base, dtype=dtype), tmp_path / "a")
    merged.to(dtype).merge_and_unload().save_pretrained(tmp_path / "merged")
    before, ours, theirs = load_all(base), load_all(out), load_all(tmp_path / "merged")
    assert ours.keys() == theirs.keys() == before.keys()
    replaced = 0
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == before[name].dtype
        if not torch.equal(tensor, theirs[name]):  # merged, and rounded once or more often
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0.01 if dtype == torch.bfloat16 else 1e-6)
        elif not torch.equal(tensor, before[name]):
            replaced += 1
    assert replaced >= len(options["modules_to_save"])
    assert not any(".original_module." in full["tensor"] for full in describe(tmp_path / "a")["full_tensors"])


@pytest.mark.filterwarnings("ignore")
def test_biases_of_a_wrapper_without_its_module_are_refused(tmp_path):
    save_base(biased(torch.float32), tmp_path / "base")
    save_adapter(biased, tmp_path / "a", target_modules=["q_proj"], bias="all", modules_to_save=["o_proj"])
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_file({n: t for n, t in tensors.items() if not n.endswith("o_proj.bias")}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"no tensor .*o_proj.(original_module|modules_to_save).bias'"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", quiet=True)


def test_projections_that_are_fused_on_one_side(tmp_path):
    """Saved in full as q, k, v where the checkpoint has one tensor, and the reverse; weights and biases."""
    save_base(biased(torch.float32), tmp_path / "split", "1GB")
    shutil.copytree(tmp_path / "split", tmp_path / "fused")
    names = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]

    def fuse(tensors):
        rest = dict(tensors)
        for kind in ("weight", "bias"):
            whole = torch.cat([rest.pop(f"{name}.{kind}") for name in names])
            rest[f"model.layers.1.self_attn.qkv_proj.{kind}"] = whole
        return rest

    save_file(fuse(load_all(tmp_path / "split")), tmp_path / "fused" / "model.safetensors")
    save_adapter(biased, tmp_path / "a", target_modules=["o_proj"], r=2, modules_to_save=["q_proj", "v_proj"])
    save_adapter(biased, tmp_path / "b", target_modules=["o_proj"], r=2)
    only = {n: t for n, t in load_file(tmp_path / "a" / WEIGHTS).items() if ".layers.0." not in n}
    save_file(only, tmp_path / "a" / WEIGHTS)
    for kind in ("split", "fused"):
        merge_checkpoint(tmp_path / kind, [tmp_path / "a"], tmp_path / f"{kind}_a", quiet=True, verify=True)
    split, fused = load_all(tmp_path / "split_a"), load_all(tmp_path / "fused_a")
    assert torch.equal(split[f"{names[2]}.weight"], only[f"base_model.model.{names[2]}.weight"])
    assert all(torch.equal(t, fused[n]) for n, t in fuse(split).items())

    whole = {f"base_model.model.{n}": t for n, t in fused.items() if "qkv_proj" in n}
    factors = {n: t for n, t in load_file(tmp_path / "b" / WEIGHTS).items() if "lora" in n}
    save_file({**whole, **factors}, tmp_path / "b" / WEIGHTS)
    merge_checkpoint(tmp_path / "split", [tmp_path / "b"], tmp_path / "split_b", quiet=True, verify=True)
    found = load_all(tmp_path / "split_b")
    assert all(torch.equal(found[f"{n}.{kind}"], split[f"{n}.{kind}"]) for n in names for kind in ("weight", "bias"))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line, self.norm = torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8)
        self.register_buffer("mask", torch.tensor([True, False]))


def test_what_a_norm_has_counted_is_replaced_too(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    save_file(Net().state_dict(), tmp_path / "base" / "model.safetensors")
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["line"], modules_to_save=["norm"]))
    model.base_model.model.norm(torch.randn(5, 8))
    model.save_pretrained(tmp_path / "a")
    merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", quiet=True, verify=True)
    found, wanted = load_all(tmp_path / "out"), model.merge_and_unload().state_dict()
    assert found["norm.num_batches_tracked"] == 1
    assert all(torch.equal(found[n], t) for n, t in wanted.items() if n.startswith("norm."))
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    counter = "base_model.model.norm.num_batches_tracked"
    save_file({**tensors, counter: tensors[counter].float()}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"is I64 and can not be replaced by torch.float32"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "refused", quiet=True)
