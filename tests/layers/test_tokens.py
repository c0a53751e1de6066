"""Trainable tokens against peft: what they compute, train, merge, save and load."""

import copy
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_kernels as lk
from lora_kernels.layers import TrainableTokensLayer, TrainableTokensWrapper

from .lm import VOCABULARY, Decoder, EncoderDecoder, ids
from .oracle import close, gradients, same

pytestmark = pytest.mark.filterwarnings("ignore")

CHOICES = {
    "list": [4, 1, 3],
    "dict": {"embed_tokens": [0, 12]},
    "both": {"embed_tokens": [1, 3], "lm_head": [1, 3]},
    "apart": {"embed_tokens": [1, 3], "lm_head": [3, 4]},
}


def randomize(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name or "trainable_tokens" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def fresh(tied=False, dtype=torch.float32, kind=Decoder, **options):
    torch.manual_seed(0)
    model = (kind if callable(kind) else Decoder)(tied, **options)
    return model.to(dtype)


def pair(tokens=(1, 3), make=fresh, adapters=("default",), **config):
    """Ours and peft's model with the same tensors; ``tokens``: of each adapter, or of all."""
    models = []
    each = tokens if isinstance(tokens, dict) and set(tokens) == set(adapters) else dict.fromkeys(adapters, tokens)
    for library in (lk, peft):
        configs = {}
        for name, chosen in each.items():
            chosen = list(chosen) if isinstance(chosen, tuple) else chosen
            values = {"target_modules": ["q_proj"], "r": 3, **config, "trainable_token_indices": chosen}
            configs[name] = library.LoraConfig(**values)
        first, *others = configs
        model = library.get_peft_model(make(), configs[first], first)
        for name in others:
            model.add_adapter(name, configs[name])
        models.append(model.eval())
    ours, theirs = models
    assert list(ours.state_dict()) == list(theirs.state_dict())
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def token_layers(model):
    return [m for m in model.modules() if type(m).__name__ == "TrainableTokensLayer"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_life_of_one_adapter(choice, tied, tmp_path):
    def make():
        return fresh(tied)

    ours, theirs = pair(CHOICES[choice], make)
    same(ours, theirs, (ids(),))
    gradients(ours, theirs, (ids(),))
    assert list(map(vars, ours.get_layer_status())) == list(map(vars, theirs.get_layer_status()))
    assert vars(ours.get_model_status()) == vars(theirs.get_model_status())
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    with ours.disable_adapter(), theirs.disable_adapter():
        same(ours, theirs, (ids(),), "disabled")
        base = ours(ids())
    before, y = {k: v.clone() for k, v in ours.state_dict().items()}, ours(ids())
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert sorted(a) == sorted(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
    for side in ("ours", "theirs"):
        for library in (lk, peft):
            for low in (False, True):
                loaded = library.PeftModel.from_pretrained(make(), str(tmp_path / side), low_cpu_mem_usage=low).eval()
                close(loaded(ids()), y.double())
    # Merging: rows come back bit for bit, and a shared weight is shared again.
    ours.merge_adapter(safe_merge=True, exact=True)
    close(ours(ids()), y.double())
    with ours.disable_adapter():
        close(ours(ids()), base.double(), y)
    ours.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    lm = ours.get_base_model()
    weights = [m.get_base_layer().weight if isinstance(m, lk.LoraLinear) else m.original_module.weight
               for m in (lm.model.embed_tokens, lm.lm_head) if hasattr(m, "original_module")]  # fmt: skip
    assert len({id(w) for w in weights}) == (1 if tied else len(weights))
    plain = ours.merge_and_unload()
    close(plain(ids()), y.double())
    assert not any("token" in type(m).__name__.lower() for m in plain.modules())
    still = tied and choice != "apart"
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == still == plain.config.tie_word_embeddings


def test_encoder_and_decoder_share_their_rows_and_merge_into_one_weight(tmp_path):
    ours, theirs = pair({"shared": [1, 3]}, lambda: fresh(kind=EncoderDecoder, tied=True))
    same(ours, theirs, (ids(),))
    gradients(ours, theirs, (ids(),))
    assert len({id(layer.trainable_tokens_delta) for layer in token_layers(ours)}) == 1 < len(token_layers(ours))
    assert sorted(lk.get_peft_model_state_dict(ours)) == sorted(peft.get_peft_model_state_dict(theirs))
    y, plain = ours(ids()), ours.merge_and_unload()
    close(plain(ids()), y.double())
    assert plain.encoder.embed_tokens.weight is plain.lm_head.weight is plain.decoder.embed_tokens.weight


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_weights(autocast):
    models = []
    for library in (lk, peft):
        config = library.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 3])
        model = library.get_peft_model(fresh(True, torch.bfloat16), config, autocast_adapter_dtype=autocast)
        model.base_model.model.model.q_proj.set_requires_grad("default", False)  # what is compared are the rows
        models.append(randomize(model.eval()))
    ours, theirs = models
    assert [p.dtype for p in ours.parameters()] == [p.dtype for p in theirs.parameters()]
    same(ours, theirs, (ids(),))
    gradients(ours, theirs, (ids(),))
    before = [p.clone() for p in ours.parameters()]
    ours.merge_adapter(exact=True)
    ours.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "options",
    [{"padding_idx": 3}, {"max_norm": 0.7}, {"scale_grad_by_freq": True}, {"max_norm": 0.7, "norm_type": 1.0}],
)
def test_options_of_the_embedding(options):
    ours, theirs = pair([1, 3, 0], lambda: fresh(**options))
    before = ours.get_base_model().model.embed_tokens.original_module.weight.clone()
    same(ours, theirs, (ids(),))
    gradients(ours, theirs, (ids(),))
    assert torch.equal(ours.get_base_model().model.embed_tokens.original_module.weight, before)


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0)])
def test_an_embedding_that_scales_its_output(scale):
    class Scaled(nn.Embedding):
        def __init__(self, *args):
            super().__init__(*args)
            self.embed_scale = scale

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    def make():
        model = fresh()
        weight, model.model.embed_tokens = model.model.embed_tokens.weight, Scaled(VOCABULARY, 8)
        model.model.embed_tokens.weight = weight
        return model

    ours, theirs = pair([1, 3], make)
    same(ours, theirs, (ids(),))
    gradients(ours, theirs, (ids(),))


def test_several_adapters():
    tokens = {"default": [0, 1, 2], "b": [2, 3], "c": None}
    ours, theirs = pair(tokens, adapters=tuple(tokens))
    for name in tokens:
        ours.set_adapter(name)
        theirs.set_adapter(name)
        same(ours, theirs, (ids(),), name)
        assert list(map(vars, ours.get_layer_status())) == list(map(vars, theirs.get_layer_status()))
    names = ["b", "default", "__base__", "b"]
    torch.testing.assert_close(ours(ids(), adapter_names=names), theirs(ids(), adapter_names=names))
    names = ["b", "default", "__base__", "c"]
    mixed = ours(ids(), adapter_names=names)
    ours.set_adapter("c")
    torch.testing.assert_close(mixed[3], ours(ids())[3])
    with pytest.raises(KeyError):
        theirs(ids(), adapter_names=names)
    ours.base_model.set_adapter(["b", "c"])
    y = ours(ids())
    with pytest.raises(ValueError, match="adapter b are already defined"):
        ours.merge_adapter(["default", "b"])
    assert not ours.base_model.lora_layers()[0].merged  # nothing was written
    ours.merge_adapter(["b"])
    with pytest.raises(ValueError, match="adapter default are already defined"):
        ours.merge_adapter(["default"])
    close(ours(ids()), y.double())  # the other active adapter takes part
    with pytest.raises(ValueError, match="merged"):
        ours.delete_adapter("b")
    with pytest.raises(ValueError, match="merged adapters"):
        ours(ids(), adapter_names=names)


@pytest.mark.parametrize("tied", [False, True])
def test_layers_on_their_own_take_disjoint_rows_of_two_adapters(tied):
    tokens = {"default": [0, 1], "b": [2, 3], "c": [3, 4]}
    ours, theirs = pair(tokens, lambda: fresh(tied), tuple(tokens))
    kinds = (lk.layers.LoraLayer, TrainableTokensWrapper, peft.tuners.lora.LoraLayer, peft.utils.TrainableTokensWrapper)
    with pytest.raises(ValueError, match="adapter c are already defined"):
        ours.get_submodule("base_model.model.model.embed_tokens").set_adapter(["b", "c"])
    for model in (ours, theirs):
        for part in [module for module in model.modules() if isinstance(module, kinds)]:
            part.set_adapter(["default", "b"])
    same(ours, theirs, (ids(),))
    originals = [model.get_submodule("base_model.model.model.embed_tokens.token_adapter") for model in (ours, theirs)]
    ours.merge_adapter(["default"])
    for name, rows in originals[1].trainable_tokens_original.items():
        assert torch.equal(originals[0].trainable_tokens_original[name], rows)


def test_what_several_adapters_can_not_do_and_deleting_one():
    tokens = {"default": [0, 1, 2], "b": [2, 3]}
    ours, theirs = pair(tokens, adapters=tuple(tokens))
    for model in (ours, theirs):
        with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
            model.base_model.set_adapter(["default", "b"])
        with pytest.raises(ValueError, match="adapter b are already defined"):
            model.merge_adapter(["default", "b"])
        model.set_adapter("b")
        model.delete_adapter("default")
    same(ours, theirs, (ids(),), "one deleted")
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("tokens", [{"default": [1, 3], "b": [2]}, {"default": None, "b": [2]}])
def test_a_weighted_combination_starts_from_the_rows_of_the_weight_as_in_peft(tokens):
    ours, theirs = pair(tokens, adapters=tuple(tokens))
    for model in (ours, theirs):
        model.base_model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "new", combination_type="cat")
        model.set_adapter("new")
    same(ours, theirs, (ids(),))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(map(vars, ours.get_layer_status())) == list(map(vars, theirs.get_layer_status()))


def test_switching_replaces_rows_and_a_failure_restores_them(monkeypatch):
    tokens = {"default": [0, 1, 2], "b": [2, 3]}
    ours, _ = pair(tokens, lambda: fresh(True), adapters=tuple(tokens))
    ours.set_adapter("b")
    expected = ours(ids())
    ours.set_adapter("default")
    y = ours(ids())
    before = [p.clone() for p in ours.parameters()]
    ours.merge_adapter(exact=True)
    merged = [p.clone() for p in ours.parameters()]
    with monkeypatch.context() as patched:
        patched.setattr(ours.base_model.lora_layers()[0], "switch", lambda *names: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ours.switch_adapter("b")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), merged, strict=True))
    close(ours(ids()), y.double())
    ours.switch_adapter("b")
    close(ours(ids()), expected.double(), y)
    ours.unmerge_adapter()
    close(ours(ids()), expected.double())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True))


def test_safe_merging_refuses_rows_that_are_not_finite():
    ours, _ = pair([1, 3])
    before = [p.clone() for p in ours.parameters()]
    token_layers(ours)[0].trainable_tokens_delta["default"].data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="embed_tokens"):
        ours.merge_adapter(safe_merge=True)
    untouched = [torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True)]
    assert untouched.count(False) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_copies_moves_and_the_weight_that_is_seen(tied):
    ours, theirs = pair([1, 3], lambda: fresh(tied))
    y = ours(ids())
    twins = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours).double().float()
    for twin in twins:
        assert torch.equal(twin(ids()), y)
        layers = token_layers(twin)
        assert len({id(layer.trainable_tokens_delta) for layer in layers}) == 1
        assert all(layer.tied_adapter in (None, layers[0]) for layer in layers)
    wrapper = ours.get_base_model().model.embed_tokens
    torch.testing.assert_close(wrapper.weight, theirs.get_base_model().model.embed_tokens.weight)
    with ours.disable_adapter():
        assert wrapper.weight is wrapper.original_module.weight
    assert wrapper.num_embeddings == VOCABULARY
    with pytest.raises(AttributeError):
        wrapper.nothing  # noqa: B018
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids()), y)
    torch._dynamo.reset()


def test_a_module_under_two_names_has_rows_for_each_as_in_peft():
    def twice():
        model = fresh(kind=EncoderDecoder, tied=False)
        model.decoder.embed_tokens = model.encoder.embed_tokens
        return model

    ours, theirs = pair({"embed_tokens": [1, 3]}, twice)
    same(ours, theirs, (ids(),))
    y = ours(ids())
    ours.merge_adapter(exact=True)
    close(ours(ids()), y.double())  # each in a copy of the module
    ours.unmerge_adapter()
    assert torch.equal(ours(ids()), y)
    assert len({id(layer.base_layer) for layer in token_layers(ours)}) == 1


def test_without_a_peft_model_around():
    config = lk.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 3])
    model = lk.inject_adapter_in_model(config, fresh(True))
    model = lk.inject_adapter_in_model(lk.LoraConfig(target_modules=["q_proj"]), model, "b")
    model = lk.inject_adapter_in_model(config, model, "c")
    wrapper = model.model.embed_tokens
    assert isinstance(wrapper, TrainableTokensWrapper)
    assert isinstance(wrapper.token_adapter, TrainableTokensLayer)
    for name, active in (("default", ["default"]), ("b", []), ("c", ["c"])):
        lk.functional.set_adapter(model, name)
        assert wrapper.active_adapters == active
        assert [n for n, p in wrapper.token_adapter.trainable_tokens_delta.items() if p.requires_grad] == active
    assert lk.functional.delete_adapter(model, "default") == ["c"]
    assert wrapper.adapter_names() == ["c"]


def test_a_tied_head_keeps_its_bias_where_peft_drops_it():
    ours, theirs = pair([1, 3], lambda: fresh(True, bias=True))
    with torch.no_grad():
        for model in (ours, theirs):
            model.get_base_model().lm_head.original_module.bias.fill_(1.0)
    y = ours(ids())
    assert (theirs(ids()) - y + 1).abs().max() < 1e-5
    for model in (ours, theirs):
        model.merge_adapter()
        close(model(ids()), y.double())


def test_different_tokens_of_tied_layers_merge_apart_where_peft_mixes_them():
    ours, theirs = pair(CHOICES["apart"], lambda: fresh(True))
    y = ours(ids())
    for model in (ours, theirs):
        model.merge_adapter()
    close(ours(ids()), y.double())
    assert (theirs(ids()) - y).abs().max() > 0.1


def test_an_accelerated_peft_model_keeps_its_rows():
    _, theirs = pair([1, 3], lambda: fresh(True))
    y = theirs(ids())
    lk.accelerate(theirs)
    torch.testing.assert_close(theirs(ids()), y)
    theirs(ids()).square().sum().backward()
    assert token_layers(theirs)[0].trainable_tokens_delta["default"].grad.abs().max() > 0
    theirs.merge_adapter()
    torch.testing.assert_close(theirs(ids()), y)
    theirs.unmerge_adapter()
    with theirs.disable_adapter():
        assert (theirs(ids()) - y).abs().max() > 0.1
    torch.testing.assert_close(theirs(ids()), y)
    lk.restore(theirs)
    torch.testing.assert_close(theirs(ids()), y)
