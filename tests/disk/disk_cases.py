"""Small checkpoints and adapters, written by transformers and PEFT themselves."""

import os
import warnings

import pytest
import torch
from safetensors.torch import load_file

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def llama(dtype, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, tie_word_embeddings=False, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def gpt2(dtype):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    return transformers.GPT2LMHeadModel(config).to(dtype)


_SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 32, "tie_word_embeddings": False,
}  # fmt: skip


def mixture(kind, dtype=torch.float32):
    """A mixture of experts, whose parameters are stacks in the model."""
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**_SIZES, num_local_experts=3)
    elif kind == "gpt_oss":  # as in the 20B model, the second stack is square
        config = transformers.GptOssConfig(**{**_SIZES, "intermediate_size": 16}, num_local_experts=3, head_dim=8)
    elif kind == "llama4":
        options = {"intermediate_size_mlp": 24, "num_local_experts": 3, "head_dim": 8, "num_experts_per_tok": 1}
        config = transformers.Llama4TextConfig(**_SIZES, **options)
    else:
        config = transformers.Qwen3MoeConfig(**_SIZES, num_experts=3, moe_intermediate_size=24, head_dim=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_config(config).to(dtype)


def save_base(model, path, shard="30KB"):
    model.save_pretrained(path, max_shard_size=shard)
    (path / "tokenizer.json").write_text('{"a": 1}')
    (path / "chat_templates").mkdir()
    (path / "chat_templates" / "tool.jinja").write_text("{{ x }}")
    (path / "pytorch_model.bin").write_bytes(b"old")


def save_adapter(make, path, seed=1, **options):
    """An adapter with nothing left at zero, saved by PEFT; returns nothing but files."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(make(torch.float32), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.normal_(0, 0.1)
        elif parameter.requires_grad:
            parameter.data.mul_(1.0 + 0.2 * torch.rand_like(parameter))
    model.save_pretrained(path)


def load_all(path):
    tensors = {}
    for name in sorted(os.listdir(path)):
        if name.endswith(".safetensors"):
            tensors.update(load_file(path / name))
    return tensors
