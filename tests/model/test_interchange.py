"""Checkpoints both ways with real ``peft``, a row of the table for every feature: what one writes the other reads.

Names and contents of the files are equal, and so are the outputs, within the error budget: no more error against
float64 than the writer has, and one rounding.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_kernels as lk

from .models import Tiny, token_ids

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8}


class Mixed(nn.Module):
    """Images (batch, 4, 6, 6) -> (batch, 5): convolutions, an embedding of the row number and linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.point = nn.Conv1d(6, 6, 1, bias=False)
        self.place = nn.Embedding(36, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.point(torch.tanh(self.conv(x)).flatten(2)).transpose(1, 2)
        return self.head(torch.tanh(x + self.place(torch.arange(36)))).mean(1)


class Llama(nn.Module):
    """What a decoder of transformers has of embeddings: ``embed_tokens``, ``lm_head`` and ways to ask for them."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.q_proj = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return self.lm_head(torch.tanh(self.q_proj(self.embed_tokens(ids))))


def images():
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def transposed():
    """transformers' Conv1D, which stores its weight (in_features, out_features)."""
    layer = pytest.importorskip("transformers").pytorch_utils.Conv1D(5, 16)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), layer)


def vectors():
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


# feature -> (model, its input, fields of the config)
FEATURES = {
    "linear": (Tiny, token_ids, {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6}),
    "dropout": (Tiny, token_ids, {"target_modules": ["q_proj"], "lora_dropout": 0.3, "r": 3}),
    "embedding": (Tiny, token_ids, {"target_modules": ["embed", "q_proj"], "r": 4}),
    "rslora": (Tiny, token_ids, {"target_modules": ["q_proj"], "r": 4, "use_rslora": True}),
    "patterns": (
        Tiny,
        token_ids,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2, "layers.1.q_proj": 7},
            "alpha_pattern": {"^layers.0.q_proj": 5},
        },
    ),
    "modules_to_save": (Tiny, token_ids, {"target_modules": ["q_proj"], "modules_to_save": ["head", "norm"]}),
    "bias_all": (Tiny, token_ids, {"target_modules": ["q_proj"], "bias": "all"}),
    "bias_lora_only": (Tiny, token_ids, {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "layers": (
        Tiny,
        token_ids,
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "exclude": (Tiny, token_ids, {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.q_proj"], "r": 2}),
    "regex": (Tiny, token_ids, {"target_modules": r".*\.0\.[qv]_proj", "r": 3}),
    "all_linear": (Tiny, token_ids, {"target_modules": "all-linear", "r": 2}),
    "embeddings_saved": (Llama, token_ids, {"target_modules": ["embed_tokens", "q_proj"], "r": 2}),
    "head_targeted": (Llama, token_ids, {"target_modules": ["lm_head"], "r": 2}),
    "convolutions": (Mixed, images, {"target_modules": ["conv", "point", "place", "head"], "r": 2}),
    "conv1d_of_transformers": (transposed, vectors, {"target_modules": ["0", "2"], "r": 3, "fan_in_fan_out": True}),
    "dora": (Tiny, token_ids, {"target_modules": ["q_proj", "v_proj"], "r": 4, "use_dora": True}),
    "dora_convolutions": (Mixed, images, {"target_modules": ["conv", "point", "head"], "r": 2, "use_dora": True}),
    "dora_embedding": (Tiny, token_ids, {"target_modules": ["embed"], "r": 3, "use_dora": True}),
    "lora_bias": (Tiny, token_ids, {"target_modules": ["q_proj"], "r": 3, "lora_bias": True}),
    "orthogonal": (Tiny, token_ids, {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "orthogonal"}),
    "pissa": (Tiny, token_ids, {"target_modules": ["q_proj"], "r": 3, "init_lora_weights": "pissa"}),
    "olora": (Tiny, token_ids, {"target_modules": ["q_proj"], "r": 3, "init_lora_weights": "olora"}),
    "task": (Tiny, token_ids, {"target_modules": ["q_proj"], "modules_to_save": ["head"], "revision": "x"}),
}


def wrapped(package, feature, dtype, seed=5):
    """A model with an adapter whose every trained tensor is random."""
    kind, _, values = FEATURES[feature]
    torch.manual_seed(0)
    model = package.get_peft_model(kind().to(dtype), package.LoraConfig(**values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def fresh(feature, dtype):
    torch.manual_seed(0)
    return FEATURES[feature][0]().to(dtype)


def output(model, feature, dtype):
    x = FEATURES[feature][1]()
    with torch.no_grad():
        return model(x.to(dtype) if x.is_floating_point() else x)


def within_budget(got, reference, model, feature):
    """``got`` is as near to ``model`` in float64 as ``reference`` is, and one rounding."""
    assert got.dtype == reference.dtype
    expected = output(copy.deepcopy(model).double(), feature, torch.float64)
    allowed = (reference.double() - expected).norm() + 2 * EPS[got.dtype] * expected.norm()
    assert (got.double() - expected).norm() <= allowed


def contents(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config[name], list):
            config[name] = sorted(config[name])
    config.pop("peft_version")
    # The bias of a module saved in full is there once more under the name of PEFT's wrapper.
    return {k: (v.shape, v.dtype) for k, v in tensors.items() if ".modules_to_save." not in k}, config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature", FEATURES)
def test_each_reads_what_the_other_writes(tmp_path, feature, dtype):
    theirs, ours = wrapped(peft, feature, dtype), wrapped(lk, feature, dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    read = lk.PeftModel.from_pretrained(fresh(feature, dtype), tmp_path / "theirs")
    peft_read = peft.PeftModel.from_pretrained(fresh(feature, dtype), tmp_path / "ours")
    # PEFT is the oracle of both: what it computes from either file, in float64, is what was meant.
    expected = peft.PeftModel.from_pretrained(fresh(feature, dtype), tmp_path / "theirs")
    within_budget(output(read, feature, dtype), output(theirs, feature, dtype), expected, feature)
    within_budget(output(ours, feature, dtype), output(peft_read, feature, dtype), peft_read, feature)
    lean = lk.PeftModel.from_pretrained(fresh(feature, dtype), tmp_path / "theirs", low_cpu_mem_usage=True)
    assert torch.equal(output(lean, feature, dtype), output(read, feature, dtype))


@pytest.mark.parametrize("feature", ["linear", "embedding", "modules_to_save"])
def test_the_state_dict_functions_interchange(feature):
    theirs, ours = wrapped(peft, feature, torch.float32), wrapped(lk, feature, torch.float32, seed=6)
    result = lk.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    assert list(result) == [[], []]
    within_budget(output(ours, feature, torch.float32), output(theirs, feature, torch.float32), theirs, feature)
    again = wrapped(peft, feature, torch.float32, seed=7)
    peft.set_peft_model_state_dict(again, lk.get_peft_model_state_dict(ours))
    assert torch.equal(output(again, feature, torch.float32), output(theirs, feature, torch.float32))


@pytest.mark.parametrize("reader", ["ours", "theirs"])
def test_several_adapters_in_their_folders(tmp_path, reader):
    """Folders of other adapters than "default", and no tensor of one in the file of another."""
    writer = wrapped(peft if reader == "ours" else lk, "linear", torch.float32)
    package = peft if reader == "ours" else lk
    writer.add_adapter("b", package.LoraConfig(target_modules=["v_proj"], r=3))
    with torch.no_grad():
        for name, parameter in writer.named_parameters():
            if ".b." in name:
                parameter.normal_(std=0.3)
    writer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert len(tensors) == 4
    assert all("v_proj" in key for key in tensors)
    other = lk if reader == "ours" else peft
    model = other.PeftModel.from_pretrained(fresh("linear", torch.float32), tmp_path)
    result = model.load_adapter(tmp_path, "b", subfolder="b")
    assert not [key for key in result.missing_keys if ".b." in key]  # PEFT counts the other adapters' keys
    for name in ("default", "b"):
        writer.set_adapter(name)
        model.set_adapter(name)
        reference = model if reader == "theirs" else writer
        outputs = [output(m, "linear", torch.float32) for m in (writer, model)]
        within_budget(*(outputs if reader == "theirs" else outputs[::-1]), reference, "linear")


def test_pickles_of_peft_are_read_without_running_them(tmp_path):
    theirs = wrapped(peft, "linear", torch.float32)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    read = lk.PeftModel.from_pretrained(fresh("linear", torch.float32), tmp_path)
    within_budget(*(output(m, "linear", torch.float32) for m in (read, theirs)), theirs, "linear")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_on_disk(tmp_path, stored):
    """Whatever floating dtype a file holds is read into the dtype that the adapter has in the model."""
    from safetensors.torch import save_file

    theirs = wrapped(peft, "linear", torch.float32)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v.to(stored) for k, v in load_file(path).items()}, path)
    read = lk.PeftModel.from_pretrained(fresh("linear", torch.float32), tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh("linear", torch.float32), tmp_path)
    within_budget(*(output(m, "linear", torch.float32) for m in (read, theirs)), theirs, "linear")
    ours = {k: v.dtype for k, v in lk.get_peft_model_state_dict(read).items()}
    assert ours == {k: v.dtype for k, v in peft.get_peft_model_state_dict(theirs).items()}


@pytest.mark.parametrize("writer", [peft, lk])
@pytest.mark.parametrize("wanted", [True, False, "auto"])
def test_save_embedding_layers(tmp_path, writer, wanted):
    model = wrapped(writer, "embeddings_saved", torch.float32)
    model.save_pretrained(tmp_path, save_embedding_layers=wanted)
    saved = "base_model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert saved == bool(wanted)
    other = lk if writer is peft else peft
    read = other.PeftModel.from_pretrained(fresh("embeddings_saved", torch.float32), tmp_path)
    ours, theirs = (read, model) if writer is peft else (model, read)
    outputs = [output(m, "embeddings_saved", torch.float32) for m in (ours, theirs)]
    within_budget(*outputs, theirs, "embeddings_saved")


# Quirks of older releases: what their files look like is written here by hand, from a checkpoint of today.


def old_file(folder, change, change_config=None):
    """Saves a checkpoint of today, then changes its tensors and its config in place."""
    from safetensors.torch import save_file

    theirs = wrapped(peft, "linear", torch.float32)
    theirs.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **(change_config or {})}))
    return theirs


def test_0_19_leaked_tensors_of_another_adapter(tmp_path):
    def leak(tensors):
        key = "base_model.model.layers.0.q_proj.lora_A"
        tensors[f"{key}.other.weight"] = torch.ones(4, 16)

    theirs = old_file(tmp_path, leak)
    read = lk.PeftModel.from_pretrained(fresh("linear", torch.float32), tmp_path)
    within_budget(*(output(m, "linear", torch.float32) for m in (read, theirs)), theirs, "linear")
    extra = read.load_adapter(tmp_path, "b").unexpected_keys
    assert extra == ["base_model.model.layers.0.q_proj.lora_A.other.weight"]


def test_0_19_wrote_no_bias_under_lora_only(tmp_path):
    """Its files lack what was trained; what there is is read, as PEFT does."""
    theirs = wrapped(peft, "bias_lora_only", torch.float32)
    theirs.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith(".bias")}, path)
    read = lk.PeftModel.from_pretrained(fresh("bias_lora_only", torch.float32), tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh("bias_lora_only", torch.float32), tmp_path)
    outputs = [output(m, "bias_lora_only", torch.float32) for m in (read, theirs)]
    within_budget(*outputs, theirs, "bias_lora_only")


def test_configs_of_other_releases(tmp_path):
    """Fields that are not there have their defaults; fields of later releases are kept for the next save."""
    theirs = old_file(tmp_path, lambda tensors: None, {"field_of_the_future": [1, 2]})
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    for name in ("use_dora", "lora_bias", "layer_replication", "eva_config", "exclude_modules", "peft_version"):
        values.pop(name)
    path.write_text(json.dumps(values))
    read = lk.PeftModel.from_pretrained(fresh("linear", torch.float32), tmp_path)
    within_budget(*(output(m, "linear", torch.float32) for m in (read, theirs)), theirs, "linear")
    read.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again["field_of_the_future"] == [1, 2]


def test_the_smallest_config(tmp_path):
    """``peft_type``, targets and a rank that is not the default are all that a file needs to say."""
    theirs = wrapped(peft, "rslora", torch.float32)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4}')
    read = lk.PeftModel.from_pretrained(fresh("linear", torch.float32), tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh("linear", torch.float32), tmp_path)
    within_budget(*(output(m, "linear", torch.float32) for m in (read, theirs)), theirs, "linear")


def test_a_vision_model_that_names_no_embeddings(tmp_path):
    """transformers' ``get_input_embeddings`` of a convolutional network raises."""
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def base():
        torch.manual_seed(0)
        return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).eval()

    with pytest.raises(NotImplementedError):
        base().get_input_embeddings()
    values = {"target_modules": ["convolution"], "modules_to_save": ["classifier", "normalization"], "r": 2}
    for package, other in ((lk, peft), (peft, lk)):
        made = package.get_peft_model(base(), package.LoraConfig(**values, init_lora_weights=False)).eval()
        made.save_pretrained(tmp_path / package.__name__)
        loaded = other.PeftModel.from_pretrained(base(), tmp_path / package.__name__).eval()
        torch.testing.assert_close(loaded(x).logits, made(x).logits, rtol=1e-4, atol=1e-4)
        again = package.get_peft_model(base(), package.LoraConfig(**values)).eval()
        package.set_peft_model_state_dict(again, package.get_peft_model_state_dict(made))
        torch.testing.assert_close(again(x).logits, made(x).logits)


def test_what_scripts_pass_to_models_is_taken(tmp_path):
    model = lk.get_peft_model(nn.Sequential(nn.Linear(8, 8)), lk.LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path, save_function=torch.save, max_shard_size="1GB", push_to_hub=False)
    with pytest.warns(UserWarning, match="torch_dtype: has no effect on adapters"):
        lk.PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 8)), tmp_path, torch_dtype=torch.float16)
    with pytest.warns(UserWarning, match="trust_remote_code: has no effect"):
        model.load_adapter(tmp_path, "b", trust_remote_code=True)
    with pytest.raises(TypeError, match="tokken: no such argument"):
        model.load_adapter(tmp_path, "c", tokken="x")
    with pytest.raises(ValueError, match=r"push_to_hub: saving does not upload"):
        model.save_pretrained(tmp_path, push_to_hub=True)
