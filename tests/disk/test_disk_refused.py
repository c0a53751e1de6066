"""What does not fit is refused by name, and nothing is written."""

import json
import os
import shutil

import pytest
import torch
from disk_cases import llama, save_adapter, save_base
from safetensors.torch import load_file, save_file

import lora_kernels as lk
from lora_kernels.disk import merge_checkpoint
from lora_kernels.disk.keys import KeyMatchError, Keys
from lora_kernels.io.checkpoint import CheckpointError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    save_base(llama(torch.bfloat16), path / "base")
    save_adapter(llama, path / "a", target_modules=["q_proj", "o_proj"], r=4)
    return path


@pytest.fixture
def job(source, tmp_path):
    shutil.copytree(source, tmp_path / "job")
    return tmp_path / "job"


def change(job, edit=None, **config):
    tensors = load_file(job / "a" / WEIGHTS)
    if edit:
        edit(tensors, sorted(tensors)[0])
        save_file(tensors, job / "a" / WEIGHTS)
    path = job / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def refused(job, match, **options):
    with pytest.raises(CheckpointError, match=match):
        merge_checkpoint(job / "base", [job / "a"], job / "out", quiet=True, **options)
    assert not list(job.glob("out*"))


def rename(old, new):
    def edit(tensors, _):
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return edit


KEYS = {
    "no such module": (rename("q_proj", "query_proj"), "no tensor .*query_proj.weight.*the nearest: .*"),
    "no such layer": (rename("layers.1.", "layers.7."), r"no tensor .*nearest: model\.layers\.\d\."),
    "half": (lambda t, k: t.pop(k), "lora_A is missing"),
    "NaN": (lambda t, k: t[k].fill_(float("nan")), "holds Inf or NaN"),
    "Inf": (lambda t, k: t[k][0].fill_(float("inf")), "holds Inf or NaN"),
    "wrong shape": (lambda t, k: t.update({k: torch.ones(4, 7)}), "does not fit"),
    "wrong rank": (lambda t, k: t.update({k: torch.ones(3, 48)}), "rank 3"),
    "no rank": (lambda t, k: t.update({n: v[:0] if "A" in n else v[:, :0] for n, v in t.items()}), "expected rank 4"),
    "eight bits": (lambda t, k: t.update({k: t[k].to(torch.float8_e4m3fn)}), "got torch.float8_e4m3fn"),
    "twice": (lambda t, k: t.update({k.removeprefix("base_model.model."): 2 * t[k]}), "a second lora_A.weight of"),
    "integers": (lambda t, k: t.update({k: torch.ones(4, 48).int()}), "floating"),
    "head that is not there": (lambda t, k: t.update({"base_model.model.score.weight": torch.ones(2, 48)}), "score"),
    "tokens": (
        lambda t, k: t.update({"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": t[k] + 0}),
        "trainable_tokens_delta can not be merged",
    ),
    "nested": (
        lambda t, k: t.update({"base_model.model.x.base_layer.lora_A.weight": t[k] + 0}),
        "nested base_layer",
    ),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_and_tensors(case, job):
    edit, match = KEYS[case]
    change(job, edit)
    refused(job, match)


CONFIGS = {
    "loha": ({"peft_type": "LOHA"}, "peft_type"),
    "rank": ({"r": 5}, "expected rank 5"),
    "dora": ({"use_dora": True}, "lora_magnitude_vector is missing"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "pattern": ({"rank_pattern": {"(": 4}}, r"json: rank_pattern: expected a regular expression, got '\('"),
    "alphas": ({"alpha_pattern": {"*.q_proj": 4}}, r"alpha_pattern: expected a regular expression, got '\*.q_proj'"),
    "targets": ({"target_modules": "["}, r"target_modules: expected a regular expression, got '\['"),
    "orientation": ({"fan_in_fan_out": True}, None),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case, job):
    config, match = CONFIGS[case]
    change(job, **config)
    if match:
        refused(job, match)


def test_square_weights_whose_orientation_is_contradicted(job, tmp_path):
    save_adapter(llama, tmp_path / "b", target_modules=["o_proj", "k_proj"], r=4)
    shutil.rmtree(job / "a")
    shutil.copytree(tmp_path / "b", job / "a")
    change(job, fan_in_fan_out=True)
    refused(job, "square and fan_in_fan_out contradicts")


def test_base_checkpoints(job):
    base = job / "base"
    shard = sorted(base.glob("*.safetensors"))[-1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-5])
    refused(job, "cut short or damaged")
    shard.unlink()
    refused(job, "incomplete download")
    shutil.rmtree(base)
    base.mkdir()
    (base / "pytorch_model.bin").write_bytes(b"x")
    refused(job, r"pytorch_model.bin.*\.bin checkpoints are not merged")
    (base / "pytorch_model.bin").unlink()
    refused(job, "no \\*.safetensors file")
    save_file({"w": torch.ones(2)}, base / "a.safetensors")
    save_file({"v": torch.ones(2)}, base / "b.safetensors")
    refused(job, "2 safetensors files and no index")


HEADERS = {
    "dtype": {"dtype": ["F32"]},
    "negative": {"shape": [-48]},
    "fraction": {"data_offsets": [0.0, 8.0]},
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_of_other_types(case, job):
    path = sorted((job / "base").glob("*.safetensors"))[0]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name].update(HEADERS[case])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(job, rf"{path.name}: its safetensors header can not be read \('{name}' is ")


def test_json_without_end(job):
    (job / "base" / "config.json").write_text("[" * 100_000)
    refused(job, "config.json: can not be read as JSON")
    (job / "a" / "adapter_config.json").write_text("[" * 100_000)
    (job / "base" / "config.json").unlink()
    refused(job, r"adapter_config.json: expected a JSON object$")


def test_quantised_weights(job):
    for path in (job / "base").glob("*.safetensors"):
        tensors = load_file(path)
        save_file({n: t.to(torch.float8_e4m3fn) if "q_proj" in n else t for n, t in tensors.items()}, path)
    refused(job, "is F8_E4M3: only F32, F16, BF16")


def test_weights_and_output(job):
    refused(job, "expected one for each of 1 adapters, got 2", weights=[1, 2])
    refused(job, "finite numbers other than 0", weights=[0])
    refused(job, "finite numbers other than 0", weights=[float("nan")])
    for out in (job / "base", job / "base" / "merged", job / "a" / "x"):
        with pytest.raises(CheckpointError, match="is, or lies in"):
            merge_checkpoint(job / "base", [job / "a"], out, quiet=True)
    (job / "out.partial").mkdir()
    (job / "out.partial" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="in the way"):
        merge_checkpoint(job / "base", [job / "a"], job / "out", quiet=True)
    assert (job / "out.partial" / "mine.txt").exists()
    assert not os.path.exists(job / "out.partial.jsonl")


def test_overflow_leaves_nothing(job):
    for path in (job / "base").glob("*.safetensors"):
        save_file({n: t.half() for n, t in load_file(path).items()}, path)
    refused(job, "Inf or NaN", weights=[1e9])


def test_tied_embeddings(tmp_path):
    config = tmp_path / "base" / "config.json"
    save_base(llama(torch.float32), tmp_path / "base", "1GB")
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    path = tmp_path / "base" / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "lm_head" not in n}, path)
    save_adapter(llama, tmp_path / "a", target_modules=["embed_tokens"], r=4)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_file({n: t for n, t in tensors.items() if ".base_layer." not in n}, tmp_path / "a" / WEIGHTS)
    refused(tmp_path, "is the output head too")
    merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", quiet=True, allow_tied=True)
    shutil.rmtree(tmp_path / "out")
    save_adapter(llama, tmp_path / "a", target_modules=["lm_head"], r=4)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_file({n: t for n, t in tensors.items() if ".base_layer." not in n}, tmp_path / "a" / WEIGHTS)
    refused(tmp_path, "has no lm_head.weight")


def test_an_embedding_that_was_trained_apart_from_its_head(tmp_path):
    """The head of the model stays as it was, in PEFT and here: one tensor can not be both."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=20, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    for tied in (False, True):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        options = {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"], "ensure_weight_tying": tied}
        model = lk.get_peft_model(base, lk.LoraConfig(r=2, **options)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / "a")
        if not tied:
            refused(tmp_path, "which the adapter was trained without changing")
            continue
        merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", quiet=True)
        merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
        ids = torch.arange(6)[None]
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_two_adapters_that_replace_the_same_tensor(job):
    norm = "base_model.model.model.norm.weight"
    for name, value in (("a", 1.0), ("b", 2.0)):
        if name == "b":
            shutil.copytree(job / "a", job / "b")
        tensors = load_file(job / name / WEIGHTS)
        save_file({**tensors, norm: torch.full((48,), value)}, job / name / WEIGHTS)
    with pytest.raises(CheckpointError, match="is also replaced by"):
        merge_checkpoint(job / "base", [job / "a", job / "b"], job / "out", quiet=True)


class _Info:
    matrix = (4, 4)


def names(*found):
    return Keys(dict.fromkeys(found, _Info))


def test_key_matching():
    assert names("model.layers.0.q.weight").find("layers.0.q.weight") == "model.layers.0.q.weight"
    assert names("layers.0.q.weight").find("base_model.model.layers.0.q.weight") == "layers.0.q.weight"
    assert names("q.weight", "wrapped.q.weight").find("q.weight") == "q.weight"
    both = names("model.layers.0.q.weight", "visual.layers.0.q.weight")
    assert both.find("model.language_model.layers.0.q.weight") == "model.layers.0.q.weight"
    with pytest.raises(KeyMatchError, match="matches several"):
        both.find("layers.0.q.weight")
    # A layer's index is no wrapper.
    assert names("score.weight").find("layers.3.score.weight") is None
    assert names("layers.1.q.weight").find("layers.11.q.weight") is None
