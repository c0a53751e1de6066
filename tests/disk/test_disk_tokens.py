"""Trainable tokens merged on disk: the rows of PEFT's merge, in one tensor or two."""

import json

import pytest
import torch
from disk_cases import llama, load_all, peft, save_adapter, save_base
from safetensors.torch import load_file, save_file

from lora_kernels.disk import merge_checkpoint
from lora_kernels.disk.inspect import describe
from lora_kernels.io.checkpoint import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tie(folder):
    """The checkpoint in ``folder`` as that of a model whose head is its embedding."""
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    path = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if n != HEAD}, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [[5, 1, 90], {"embed_tokens": [0, 2], "lm_head": [2, 95]}])
def test_rows_are_those_of_pefts_merge(tokens, dtype, tmp_path):
    save_base(llama(dtype), tmp_path / "base")
    save_adapter(llama, tmp_path / "a", target_modules=["q_proj"], r=2, trainable_token_indices=tokens)
    before = load_all(tmp_path / "base")
    expected = peft.PeftModel.from_pretrained(llama(dtype), str(tmp_path / "a")).merge_and_unload().state_dict()
    merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", quiet=True, verify=True)
    found = load_all(tmp_path / "out")
    for name in (EMBEDDING, HEAD):
        assert torch.equal(found[name], expected[name])
    changed = (found[EMBEDDING] != before[EMBEDDING]).any(1).nonzero().flatten().tolist()
    assert changed == sorted(tokens if isinstance(tokens, list) else tokens["embed_tokens"])
    listed = {f["tensor"] for f in describe(tmp_path / "a")["full_tensors"]}
    assert f"{EMBEDDING}, {len(changed)} rows" in listed


def test_rows_of_an_embedding_that_is_the_head_too(tmp_path):
    save_base(llama(torch.float32), tmp_path / "base", "1GB")
    tie(tmp_path / "base")
    save_adapter(llama, tmp_path / "a", target_modules=["q_proj"], r=2, trainable_token_indices=[5, 1])
    merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", quiet=True, verify=True)
    rows = load_file(tmp_path / "a" / "adapter_model.safetensors")
    rows = rows["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert torch.equal(load_all(tmp_path / "out")[EMBEDDING][[5, 1]], rows)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1], [96], "row 96"),
        ([1], [1], "row 1 of 'model.embed_tokens.weight' is also replaced"),
        ([1], None, "rows of one adapter and an update"),
        ([1], {"q_proj": [1]}, "names no tokens"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(first, second, message, tmp_path):
    save_base(llama(torch.float32), tmp_path / "base")
    save_adapter(llama, tmp_path / "a", target_modules=["q_proj"], r=2, trainable_token_indices=first)
    if second is None:
        save_adapter(llama, tmp_path / "b", target_modules=["embed_tokens"], r=2)
        path = tmp_path / "b" / "adapter_model.safetensors"
        save_file({n: t for n, t in load_file(path).items() if ".base_layer." not in n}, path)
    else:
        save_adapter(llama, tmp_path / "b", target_modules=["q_proj"], r=2, trainable_token_indices=[1])
        path = tmp_path / "b" / "adapter_model.safetensors"
        save_file({n: 2 * t for n, t in load_file(path).items()}, path)
        config = tmp_path / "b" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "trainable_token_indices": second}))
    with pytest.raises(CheckpointError, match=message):
        merge_checkpoint(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
