"""Adapters as kohya's scripts and diffusers write them, and where an adapter may be read from."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_kernels as lk
from lora_kernels.io.checkpoint import CheckpointError
from lora_kernels.io.layouts import is_foreign, to_peft

from .models import randomize, tiny, token_ids

pytestmark = pytest.mark.filterwarnings("ignore")


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])

    def forward(self, x):
        weights = torch.softmax(self.to_q(x) @ self.to_k(x).transpose(-1, -2), -1)
        return self.to_out[1](self.to_out[0](weights @ self.to_v(x)))


class TextLayer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.q_proj, self.self_attn.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.self_attn.out_proj(torch.tanh(self.self_attn.q_proj(x)))


class Unet(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.proj_in = nn.Linear(dim, dim)
        self.down_blocks = nn.ModuleList(nn.ModuleDict({"attn1": Attention(dim)}) for _ in range(2))
        self.conv = nn.Conv1d(dim, dim, 1)

    def forward(self, x):
        x = self.proj_in(x)
        for block in self.down_blocks:
            x = x + block["attn1"](x)
        return self.conv(x.transpose(-1, -2)).transpose(-1, -2)


class Pipe(nn.Module):
    def __init__(self):
        super().__init__()
        self.unet, self.text_encoder = Unet(), TextLayer(8)

    def forward(self, x):
        return self.unet(self.text_encoder(x))


def pipe():
    torch.manual_seed(0)
    return Pipe()


def factors(paths, ranks, seed=1):
    """module path -> (A, B, alpha): linear layers of 8 features."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for path, rank in zip(paths, ranks, strict=True):
        a, b = (torch.randn(shape, generator=generator) for shape in ((rank, 8), (8, rank)))
        drawn[path] = a, b, rank / 2 + 0.5
    return drawn


def applied(model, drawn, alphas=True):
    """The model with the updates in its weights."""
    with torch.no_grad():
        for path, (a, b, alpha) in drawn.items():
            weight = model.get_submodule(path).weight
            weight += (b @ a * ((alpha / a.shape[0]) if alphas else 1.0)).reshape(weight.shape)
    return model


PATHS = ["unet.proj_in", "unet.down_blocks.0.attn1.to_q", "unet.down_blocks.1.attn1.to_out.0"]
TEXT = ["text_encoder.self_attn.q_proj", "text_encoder.self_attn.out_proj"]


def kohya(drawn, te="lora_te"):
    tensors = {}
    for path, (a, b, alpha) in drawn.items():
        part, _, below = path.partition(".")
        name = ("lora_unet_" if part == "unet" else te + "_") + below.replace(".", "_")
        conv = path.endswith("proj_in")  # Stable Diffusion 1 has convolutions where later models have linear layers
        tensors[f"{name}.lora_down.weight"] = a[..., None, None] if conv else a
        tensors[f"{name}.lora_up.weight"] = b[..., None, None] if conv else b
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def dotted(drawn, a_name, b_name, alpha=False):
    tensors = {}
    for path, (a, b, value) in drawn.items():
        tensors[path + a_name], tensors[path + b_name] = a, b
        if alpha:
            tensors[path + ".alpha"] = torch.tensor(value)
    return tensors


def processors(drawn):
    tensors = {}
    for path, (a, b, _) in drawn.items():
        parent, _, last = path.removesuffix(".0").rpartition(".")
        last = {"q_proj": "to_q", "out_proj": "to_out"}.get(last, last)
        middle = ".processor" if path.startswith("unet") else ""
        tensors[f"{parent}{middle}.{last}_lora.down.weight"] = a
        tensors[f"{parent}{middle}.{last}_lora.up.weight"] = b
    return tensors


LAYOUTS = {
    "kohya": (PATHS + TEXT, kohya, True),
    "kohya_te1": (PATHS + TEXT, lambda d: kohya(d, "lora_te1"), True),
    "diffusers": (PATHS + TEXT, lambda d: dotted(d, ".lora_A.weight", ".lora_B.weight"), False),
    "diffusers_alpha": (PATHS + TEXT, lambda d: dotted(d, ".lora_A.weight", ".lora_B.weight", True), True),
    "lora_down": (PATHS + TEXT, lambda d: dotted(d, ".lora.down.weight", ".lora.up.weight"), False),
    "linear_layer": (
        PATHS + TEXT,
        lambda d: dotted(d, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", True),
        True,
    ),
    "attention_processors": (PATHS[1:] + TEXT, processors, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saved", ["file", "folder"])
def test_foreign_layouts_are_read(tmp_path, layout, saved):
    paths, write, alphas = LAYOUTS[layout]
    drawn = factors(paths, range(2, 2 + len(paths)))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({k: v.contiguous() for k, v in write(drawn).items()}, file)
    assert is_foreign(load_file(file))
    model = lk.PeftModel.from_pretrained(pipe(), file if saved == "file" else tmp_path)
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
    expected = applied(pipe().double(), {p: (a.double(), b.double(), s) for p, (a, b, s) in drawn.items()}, alphas)
    error = (model(x).double() - expected(x.double())).norm() / expected(x.double()).norm()
    assert error < 64 * 2**-23
    assert {layer.r["default"] for layer in model.base_model.lora_layers()} == set(range(2, 2 + len(paths)))
    model.load_adapter(file, "again")
    model.set_adapter("again")
    assert float((model(x).double() - expected(x.double())).norm() / expected(x.double()).norm()) == float(error)


# Without a PeftModel around it a pipeline's own keys are those of diffusers, and mean PEFT's.
SET = [(name, injected) for name in LAYOUTS for injected in (False, True) if not (injected and "diffusers" in name)]


@pytest.mark.parametrize(("layout", "injected"), SET)
def test_foreign_layouts_are_set_in_an_adapter_that_is_there(tmp_path, layout, injected):
    """With its own scaling: what it computes and saves is what the file says. PEFT sets nothing, without a word."""
    paths, write, alphas = LAYOUTS[layout]
    drawn = factors(paths, [3] * len(paths))
    values = {"r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": paths, "init_lora_weights": False}
    config = lk.LoraConfig(**values)
    model = lk.inject_adapter_in_model(config, pipe()) if injected else lk.get_peft_model(pipe(), config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*(only|missing)"):
        lk.set_peft_model_state_dict(model, dict(list(write(drawn).items())[1:]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    result = lk.set_peft_model_state_dict(model, write(drawn), strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
    expected = applied(pipe().double(), {p: (a.double(), b.double(), s) for p, (a, b, s) in drawn.items()}, alphas)
    assert (model(x).double() - expected(x.double())).norm() / expected(x.double()).norm() < 64 * 2**-23
    if not injected:
        model.save_pretrained(tmp_path)
        assert torch.equal(lk.PeftModel.from_pretrained(pipe(), tmp_path)(x), model(x))
        peft = pytest.importorskip("peft")
        theirs = peft.get_peft_model(pipe(), peft.LoraConfig(**values))
        assert len(peft.set_peft_model_state_dict(theirs, write(drawn)).unexpected_keys) == len(write(drawn))


def test_one_part_of_a_pipeline_takes_its_own_keys():
    drawn = factors(PATHS, (2, 3, 2))
    for write in (kohya, lambda d: dotted(d, ".lora_A.weight", ".lora_B.weight")):
        config, tensors = to_peft(pipe().unet, write(drawn))
        below = [path.removeprefix("unet.") for path in PATHS]
        assert set(tensors) == {f"base_model.model.{p}.lora_{f}.weight" for p in below for f in "AB"}
        assert config.target_modules == set(below)


def test_a_linear_adapter_of_a_pointwise_convolution():
    a, b = torch.randn(2, 8), torch.randn(8, 2)
    _, tensors = to_peft(pipe().unet, {"lora_unet_conv.lora_down.weight": a, "lora_unet_conv.lora_up.weight": b})
    assert tensors["base_model.model.conv.lora_A.weight"].shape == (2, 8, 1)


def test_targets_hit_what_was_named_and_nothing_else():
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "inner": nn.ModuleDict({"q": nn.Linear(8, 8)})})
    tensors = {"lora_unet_q.lora_down.weight": torch.ones(2, 8), "lora_unet_q.lora_up.weight": torch.ones(8, 2)}
    config, tensors = to_peft(model, tensors)
    assert list(tensors) == ["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"]
    wrapped = lk.get_peft_model(model, config)
    assert [n for n, m in wrapped.named_modules() if isinstance(m, lk.LoraLinear)] == ["base_model.model.q"]


class Twins(nn.Module):
    def __init__(self):
        super().__init__()
        self.a_b = nn.ModuleDict({"c": nn.Linear(4, 4)})
        self.a = nn.ModuleDict({"b_c": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_a_b_c.lora_down.weight": torch.ones(1, 4)}, r"could be any of a_b\.c, a\.b_c"),
        ({"lora_unet_a_b_d.lora_down.weight": torch.ones(1, 4)}, r"names no module; nearest: .*a_b\.c"),
        ({"a_b.c.lora.down.weight": torch.ones(1, 4)}, r"a_b\.c: only \['lora_A'\]"),
        ({"a_b.c.lora.down.weight": torch.ones(1, 4), "a_b.c.odd": torch.ones(1)}, r"a_b\.c\.odd: of no known layout"),
        ({"lora_unet_x.hada_w1_a": torch.ones(1), "y.lora_down.weight": torch.ones(1)}, "not plain LoRA"),
        ({"lora_unet_x.dora_scale": torch.ones(1), "y.lora_down.weight": torch.ones(1)}, "not plain LoRA"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, tensors, message):
    model = Twins()
    save_file(tensors, tmp_path / "lora.safetensors")
    before = list(model.named_modules())
    with pytest.raises(CheckpointError, match=message):
        lk.PeftModel.from_pretrained(model, tmp_path / "lora.safetensors")
    assert list(model.named_modules()) == before


def test_shapes_of_another_model_are_refused(tmp_path):
    drawn = factors(PATHS, (2, 2, 2))
    tensors = kohya(drawn)
    tensors["lora_unet_down_blocks_0_attn1_to_q.lora_up.weight"] = torch.ones(9, 2)
    save_file(tensors, tmp_path / "lora.safetensors")
    model = pipe()
    before = list(model.named_modules())
    with pytest.raises(CheckpointError, match=r"to_q\.lora_B\.weight: expected shape \(8, 2\), got \(9, 2\)"):
        lk.PeftModel.from_pretrained(model, tmp_path / "lora.safetensors")
    assert list(model.named_modules()) == before


def test_the_pool_reads_them_too(tmp_path):
    drawn = factors(PATHS, (2, 3, 2))
    save_file(kohya(drawn), tmp_path / "lora.safetensors")
    pool = lk.AdapterPool(pipe(), num_slots=2, max_rank=4)
    pool.register("style", tmp_path / "lora.safetensors")
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode(), pool.batch(["style", None]):
        y = pool.model(x)
    torch.testing.assert_close(y[:1], applied(pipe(), drawn)(x[:1]))
    torch.testing.assert_close(y[1:], pipe()(x[1:]))


# Where an adapter comes from


def saved(folder, seed=2):
    model = randomize(lk.get_peft_model(tiny(), lk.LoraConfig(target_modules=["q_proj"], r=3)), seed).eval()
    model.save_pretrained(folder)
    return model


def test_subfolder_key_mapping_and_mismatched_sizes(tmp_path):
    peft = pytest.importorskip("peft")
    ours = saved(tmp_path / "sub" / "folder")
    loaded = lk.PeftModel.from_pretrained(tiny(), tmp_path, subfolder="sub/folder", torch_device="cpu")
    assert torch.equal(loaded(token_ids()), ours(token_ids()))
    path = tmp_path / "sub" / "folder" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k.replace("q_proj", "query").replace("layers", "layer"): v for k, v in tensors.items()}, path)
    mapping = {r"layer\.(\d+)\.query": r"layers.\1.q_proj"}
    arguments = (tmp_path / "sub" / "folder",)
    again = lk.PeftModel.from_pretrained(tiny(), *arguments, key_mapping=mapping)
    theirs = peft.PeftModel.from_pretrained(tiny(), *arguments, key_mapping=mapping)
    assert torch.equal(again(token_ids()), ours(token_ids()))
    torch.testing.assert_close(theirs(token_ids()), ours(token_ids()))
    with pytest.raises(ValueError, match="two keys"):
        lk.PeftModel.from_pretrained(tiny(), *arguments, key_mapping={".*": "x"})
    key = "base_model.model.layers.0.q_proj.lora_A.weight"
    save_file({**tensors, key: torch.ones(5, 16)}, path)
    with pytest.raises(CheckpointError, match="expected shape"):
        lk.PeftModel.from_pretrained(tiny(), *arguments)
    with pytest.warns(UserWarning, match="another size"):
        lax = lk.PeftModel.from_pretrained(tiny(), *arguments, ignore_mismatched_sizes=True)
    state = lk.get_peft_model_state_dict(lax)
    assert state[key].shape == (3, 16)
    for other in tensors:
        assert other == key or torch.equal(state[other], tensors[other])
    with pytest.raises(TypeError, match="subfolders: no such argument"):
        lk.PeftModel.from_pretrained(tiny(), *arguments, subfolders="x")


def hub_cache(root, name, files, commit="0" * 40):
    """The files of a repository where huggingface_hub keeps them."""
    repository = root / ("models--" + name.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for path, source in files.items():
        target = repository / "snapshots" / commit / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())


@pytest.mark.parametrize("subfolder", [None, "sub"])
def test_a_repository_in_the_local_cache(tmp_path, subfolder):
    pytest.importorskip("huggingface_hub")
    ours = saved(tmp_path / "made")
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = {os.path.join(subfolder or "", name): tmp_path / "made" / name for name in names}
    hub_cache(tmp_path / "cache", "someone/adapter", files)
    where = {"cache_dir": tmp_path / "cache", "subfolder": subfolder, "local_files_only": True}
    loaded = lk.PeftModel.from_pretrained(tiny(), "someone/adapter", revision="main", **where)
    assert torch.equal(loaded(token_ids()), ours(token_ids()))
    loaded.load_adapter("someone/adapter", "b", **where)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at 'someone/other'.*not on the Hub"):
        lk.PeftModel.from_pretrained(tiny(), "someone/other", **where)
    hub_cache(tmp_path / "cache", "someone/half", {k: v for k, v in files.items() if k.endswith("json")})
    with pytest.raises(CheckpointError, match=r"neither .* nor"):
        lk.PeftModel.from_pretrained(tiny(), "someone/half", **where)


def test_a_folder_without_a_config_is_an_error_and_its_name_is_in_it(tmp_path):
    saved(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at"):
        lk.PeftModel.from_pretrained(tiny(), tmp_path)
    loaded = lk.PeftModel.from_pretrained(tiny(), tmp_path, config=lk.LoraConfig.from_dict(values))
    assert not loaded.training


def test_a_failed_load_leaves_what_trains_and_the_modes(tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(path), "stray": torch.ones(1)}, path)
    model = tiny().train()
    with pytest.raises(CheckpointError, match="stray"):
        lk.PeftModel.from_pretrained(model, tmp_path, strict=True)
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
