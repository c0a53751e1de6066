"""Hot-swapping: other weights under the name of an adapter that is there, beside PEFT and beside loading."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_kernels as lk
from lora_kernels.io.checkpoint import CheckpointError
from lora_kernels.utils import hotswap as ours

from .models import randomize, tiny, token_ids

peft = pytest.importorskip("peft")
theirs = pytest.importorskip("peft.utils.hotswap")
pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = pytest.mark.parametrize(("package", "hotswap"), [(peft, theirs), (lk, ours)], ids=["peft", "ours"])


def saved(path, seed, make=tiny, package=lk, **values):
    config = package.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **values})
    model = randomize(package.get_peft_model(make(), config), seed).eval()
    model.save_pretrained(path)
    return model


def swapped(tmp_path, first, second, make=tiny, package=lk, hotswap=ours, prepare=None):
    """``model, wanted``: one into which the second adapter was swapped, and one that was made with it."""
    saved(tmp_path / "one", 1, make, package, **first)
    wanted = saved(tmp_path / "two", 2, make, package, **second)
    model = package.PeftModel.from_pretrained(make(), tmp_path / "one").eval()
    if prepare:
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=prepare)
    hotswap.hotswap_adapter(model, tmp_path / "two", "default", torch_device="cpu")
    return model, wanted


def distance(model, wanted, x=None):
    x = token_ids() if x is None else x
    return float((model(x) - wanted(x)).abs().max())


def state(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def is_as(model, before):
    return all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


PATTERNS = {
    "rank_pattern": ({}, {"rank_pattern": {"q_proj": 3}}),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 3}}, {"alpha_pattern": {"q_proj": 3}, "r": 2}),
    "anchored": ({}, {"rank_pattern": {"^layers.0.q_proj": 2, r"layers\.1\.v_proj": 7}}),
}


@pytest.mark.parametrize("kind", PATTERNS)
def test_patterns_of_ranks_and_alphas_count_where_peft_ignores_them(tmp_path, kind):
    for package, hotswap in ((peft, theirs), (lk, ours)):
        model, wanted = swapped(tmp_path / package.__name__, *PATTERNS[kind], package=package, hotswap=hotswap)
        assert (distance(model, wanted) > 0.05) == (package is peft)
    torch.testing.assert_close(model(token_ids()), wanted(token_ids()))


@pytest.mark.parametrize("prepare", [None, 16])
@pytest.mark.parametrize("r", [2, 9])
@pytest.mark.parametrize("kind", ["dora", "embed", "conv1", "conv3", "parameter"])
def test_kinds_that_peft_can_not_swap(tmp_path, kind, r, prepare):
    make, x, values = KINDS[kind]
    model, wanted = swapped(tmp_path / "ours", values, {**values, "r": r}, make, prepare=prepare)
    torch.testing.assert_close(model(x), wanted(x), rtol=1e-4, atol=1e-5)
    if r < 9:  # larger tensors are taken as they are
        swap = tmp_path / "theirs", values, {**values, "r": r}, make, peft, theirs, prepare
        with pytest.raises((KeyError, AttributeError, NotImplementedError, AssertionError)):
            assert distance(*swapped(*swap), x) < 0.05


class Conv(nn.Module):
    def __init__(self, dims):
        super().__init__()
        torch.manual_seed(0)
        self.conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims](3, 8, 3)

    def forward(self, x):
        return self.conv(x)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(3, 8, 6))
        self.inner.forward = lambda x: torch.einsum("bi,eoi->bo", x, self.inner.weight)

    def forward(self, x):
        return self.inner(x)


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


KINDS = {
    "dora": (tiny, token_ids(), {"use_dora": True}),
    "embed": (tiny, token_ids(), {"target_modules": ["embed", "q_proj"]}),
    "conv1": (lambda: Conv(1), numbers(2, 3, 9), {"target_modules": ["conv"]}),
    "conv3": (lambda: Conv(3), numbers(2, 3, 4, 4, 4), {"target_modules": ["conv"]}),
    "parameter": (Experts, numbers(4, 6), {"target_parameters": ["inner.weight"], "target_modules": []}),
}


@BOTH
def test_adapters_whose_names_begin_alike_are_left_alone_where_peft_zeroes_them(tmp_path, package, hotswap):
    model = saved(tmp_path / "one", 1, package=package)
    saved(tmp_path / "two", 2, package=package, target_modules=["q_proj"])
    for name in ("default2", "a"):
        model.load_adapter(tmp_path / "one", name)
    before = state(model)
    hotswap.hotswap_adapter(model, tmp_path / "two", "default", torch_device="cpu")
    hotswap.hotswap_adapter(model, tmp_path / "two", "a", torch_device="cpu")
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(before[key], tensor)}
    assert any(".default." in key for key in changed)
    assert any(".default2." in key for key in changed) == (package is peft)


@pytest.mark.parametrize("package", [peft, lk], ids=["peft", "ours"])
@pytest.mark.parametrize(
    ("values", "prepare"),
    [({"r": 2}, None), ({"r": 9}, None), ({"lora_alpha": 3}, None), ({"r": 2, "target_modules": ["q_proj"]}, 16)],
    ids=["smaller", "larger", "alpha", "padded"],
)
def test_what_was_swapped_in_is_saved_with_its_scaling_where_peft_saves_the_one_before(
    tmp_path, package, values, prepare
):
    hotswap = theirs if package is peft else ours
    model, wanted = swapped(tmp_path, {}, values, package=package, hotswap=hotswap, prepare=prepare)
    model.save_pretrained(tmp_path / "again")
    for reader in (peft, lk):
        if package is lk:
            loaded = reader.PeftModel.from_pretrained(tiny(), tmp_path / "again").eval()
            torch.testing.assert_close(loaded(token_ids()), wanted(token_ids()), rtol=1e-4, atol=1e-5)
        else:
            with pytest.raises((RuntimeError, AssertionError)):
                assert distance(reader.PeftModel.from_pretrained(tiny(), tmp_path / "again").eval(), wanted) < 0.05


def test_ranks_that_differ_are_saved_as_patterns_and_scalings_follow(tmp_path):
    second = {"rank_pattern": {"layers.0.q_proj": 7}, "alpha_pattern": {}, "use_rslora": True}
    model, wanted = swapped(tmp_path, {"use_rslora": True}, second)
    for layer in model.base_model.lora_layers():
        layer.set_scale("default", 1.0)
    torch.testing.assert_close(model(token_ids()), wanted(token_ids()))
    model.save_pretrained(tmp_path / "again")
    assert lk.LoraConfig.from_pretrained(tmp_path / "again").rank_pattern == {r"^layers\.0\.q_proj": 7}
    again = lk.PeftModel.from_pretrained(tiny(), tmp_path / "again").eval()
    torch.testing.assert_close(again(token_ids()), wanted(token_ids()))
    # The config at hand is the one that it was, as in PEFT: the next adapter is compared with it.
    assert model.peft_config["default"].rank_pattern == {}
    ours.hotswap_adapter(model, tmp_path / "two", "default")


def test_a_dora_adapter_of_fewer_modules_leaves_the_others_as_the_base_has_them(tmp_path):
    model, wanted = swapped(tmp_path, {"use_dora": True}, {"use_dora": True, "target_modules": ["q_proj"]})
    torch.testing.assert_close(model(token_ids()), wanted(token_ids()))


def test_a_swapped_adapter_of_a_larger_rank_is_combined(tmp_path):
    model, wanted = swapped(tmp_path, {}, {"r": 9})
    model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "both", "cat")
    model.set_adapter("both")
    torch.testing.assert_close(model(token_ids()), wanted(token_ids()))


def damage(tensors, kind):
    key = next(key for key in tensors if "lora_A" in key)
    other = key.replace("lora_A", "lora_B")
    if kind == "rank":
        tensors[other] = tensors[other][:, :1].contiguous()
    else:
        a = tensors[key]
        change = {"narrow": a[:, :8].clone(), "wide": torch.cat([a, a], 1), "3d": a[None], "integer": a.int()}
        tensors[key] = change[kind]
    return tensors


@pytest.mark.parametrize("kind", ["narrow", "wide", "3d", "integer", "rank"])
def test_damaged_tensors_are_named_and_nothing_changes(tmp_path, kind):
    model = saved(tmp_path / "one", 1)
    saved(tmp_path / "two", 2, r=2)
    file = tmp_path / "two" / "adapter_model.safetensors"
    save_file(damage(load_file(file), kind), file)
    before = state(model)
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_[AB]\.default\.weight"):
        ours.hotswap_adapter(model, tmp_path / "two", "default")
    assert is_as(model, before)
    ours.hotswap_adapter(model, tmp_path / "one", "default")


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@BOTH
def test_a_module_with_one_factor_gets_no_update(tmp_path, package, hotswap, factor):
    model = saved(tmp_path / "one", 1, package=package)
    wanted = saved(tmp_path / "two", 2, package=package)
    file, key = tmp_path / "two" / "adapter_model.safetensors", f"base_model.model.layers.0.q_proj.{factor}.weight"
    tensors = load_file(file)
    del tensors[key]
    save_file(tensors, file)
    hotswap.hotswap_adapter(model, tmp_path / "two", "default", torch_device="cpu")
    with torch.no_grad():
        wanted.get_submodule("base_model.model.layers.0.q_proj.lora_B.default").weight.zero_()
    torch.testing.assert_close(model(token_ids()), wanted(token_ids()), rtol=1e-4, atol=1e-5)


def test_an_adapter_that_is_not_there_is_named(tmp_path):
    model = saved(tmp_path / "one", 1)
    with pytest.raises(ValueError, match=r"no adapter 'x'; adapters: \['default'\]"):
        ours.hotswap_adapter(model, tmp_path / "one", "x")


@BOTH
def test_padding_again_and_to_less_than_there_is(package, hotswap):
    model = randomize(package.get_peft_model(tiny(), package.LoraConfig(r=4, target_modules=["q_proj"]))).eval()
    y = model(token_ids())
    for rank in (16, 16, 20):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=rank)
        torch.testing.assert_close(model(token_ids()), y)
    before = state(model)
    with pytest.raises(ValueError, match=r"target rank 12, but the original rank is larger \(20\)"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=12)
    assert is_as(model, before)


def test_compiled_code_stays_valid(tmp_path):
    model = saved(tmp_path / "one", 1)
    wanted = [saved(tmp_path / str(r), r, r=r, lora_alpha=a, **t)(token_ids()) for r, a, t in SWAPS]
    ours.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.inference_mode():
        compiled(token_ids())
        with torch._dynamo.config.patch(error_on_recompile=True):
            for (r, _, _), y in zip(SWAPS, wanted, strict=True):
                ours.hotswap_adapter(compiled, tmp_path / str(r), "default")
                torch.testing.assert_close(compiled(token_ids()), y, rtol=1e-4, atol=1e-5)


SWAPS = [(2, 3, {}), (8, 4, {"rank_pattern": {"q_proj": 5}}), (1, 16, {"target_modules": ["v_proj"]})]


@pytest.mark.parametrize(("r", "prepare"), [(2, None), (9, None), (2, 16)])
def test_tied_factors_stay_tied_and_base_weights_beside_an_adapter_are_no_other_modules(tmp_path, r, prepare):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=40, num_hidden_layers=1, tie_word_embeddings=True, **size)

    def make():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)

    values = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    model, wanted = swapped(tmp_path, values, {**values, "r": r}, make, prepare=prepare)
    torch.testing.assert_close(model(token_ids()).logits, wanted(token_ids()).logits, rtol=1e-4, atol=1e-5)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.lora_A["default"].weight.data_ptr() == embed.lora_embedding_B["default"].data_ptr()
    tensors = load_file(tmp_path / "two" / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**tensors, key: tensors[key] + 1}, tmp_path / "two" / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match=r"unexpected keys found: .*embed_tokens"):
        ours.hotswap_adapter(model, tmp_path / "two", "default")


def test_a_state_dict_is_swapped_in_under_the_keys_of_the_model(tmp_path):
    model, wanted = saved(tmp_path / "one", 1), saved(tmp_path / "two", 2, r=2)
    tensors = {k: t for k, t in wanted.state_dict().items() if "lora_" in k}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.hotswap_adapter_from_state_dict(model, tensors, "default", wanted.peft_config["default"])
    torch.testing.assert_close(model(token_ids()), wanted(token_ids()))
