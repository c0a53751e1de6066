"""``ensure_weight_tying``, and weights and modules that a model has under several names, against peft."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

import lora_kernels as lk
from lora_kernels.layers import ModulesToSaveWrapper

from .lm import Decoder, EncoderDecoder, ids
from .oracle import close, gradients, same
from .test_tokens import randomize

KINDS = {"decoder": Decoder, "encoder-decoder": EncoderDecoder}


def make(kind="decoder", tied=True, says_so=True, **options):
    torch.manual_seed(0)
    model = KINDS[kind](tied, **options)
    model.config.tie_word_embeddings = says_so
    return model


def pair(base=make, **config):
    models = []
    for library in (lk, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(base(), library.LoraConfig(**{"r": 3, **config}))
        models.append(model.eval())
    ours, theirs = models
    for module in theirs.modules():
        getattr(module, "kwargs", {}).pop("tied_adapter", None)  # with which peft's model can not be copied
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return ours, theirs


def equalize(ours, theirs):
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())


def caught(library, base, **config):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        model = library.get_peft_model(base(), library.LoraConfig(**config))
    kinds = ("no tied modules were found", "no tied modules are added", "`ensure_weight_tying` is not set to True")
    kinds += ("the model does not have tied weights",)
    return model, [kind for kind in kinds if any(kind in str(w.message) for w in record)]


@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ".*(q_proj|lm_head)$"},
        {"target_modules": ".*lm_head$"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["model.embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]}},
    ],
)
def test_what_is_wrapped_warned_of_and_saved_is_what_peft_does(config, tied, ensure):
    def base():
        return make(tied=tied, says_so=tied)

    ours, warned = caught(lk, base, **config, ensure_weight_tying=ensure)
    theirs, expected = caught(peft, base, **config, ensure_weight_tying=ensure)
    assert warned == expected
    assert list(ours.state_dict()) == list(theirs.state_dict())
    a, b = ours.peft_config["default"], theirs.peft_config["default"]
    assert set(a.modules_to_save or ()) == set(b.modules_to_save or ())
    assert a.target_modules == b.target_modules
    storages = []
    for model in (ours, theirs):
        pointers = [p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False)]
        storages.append([pointers.index(p) for p in pointers])
    assert storages[0] == storages[1]
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def shared_storage(layer, head):
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return (a.data_ptr(), b.data_ptr()) == (
        head.lora_B["default"].weight.data_ptr(),
        head.lora_A["default"].weight.data_ptr(),
    )


def parts_of(model):
    base = model.get_base_model()
    return base.model.embed_tokens, base.lm_head


def test_tied_factors_stay_one_storage_through_copies_moves_and_loading(tmp_path):
    config = {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}
    ours, theirs = pair(**config)
    equalize(ours, theirs)
    same(ours, theirs, (ids(),))
    gradients(ours, theirs, (ids(),))
    y = ours(ids())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours).double().float()):
        assert shared_storage(*parts_of(twin))
        assert torch.equal(twin(ids()), y)
    assert not shared_storage(*parts_of(copy.deepcopy(theirs).double()))  # peft's come apart
    for library, model in ((lk, ours), (peft, theirs)):
        model.save_pretrained(tmp_path / library.__name__)
    a, b = (load_file(tmp_path / side.__name__ / "adapter_model.safetensors") for side in (lk, peft))
    assert sorted(a) == sorted(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for side in (lk, peft):
            for low in (False, True):
                folder = str(tmp_path / side.__name__)
                loaded = lk.PeftModel.from_pretrained(make(), folder, low_cpu_mem_usage=low).eval()
                assert shared_storage(*parts_of(loaded))
                close(loaded(ids()), y.double())
    loaded = peft.PeftModel.from_pretrained(make(), str(tmp_path / "lora_kernels")).eval()
    close(loaded(ids()), y.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_tie_their_float32_factors_where_peft_parts_them(dtype):
    config = {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}
    ours, theirs = pair(lambda: make().to(dtype), **config)
    assert parts_of(ours)[0].lora_embedding_A["default"].dtype is torch.float32
    assert shared_storage(*parts_of(ours))
    assert not shared_storage(*parts_of(theirs))


@pytest.mark.parametrize("init", [True, False, "gaussian", "pissa", "olora", "orthogonal"])
def test_tied_factors_start_without_effect_on_the_base(init):
    config = {"target_modules": ["lm_head"], "ensure_weight_tying": True, "init_lora_weights": init, "r": 2}
    ours, base = pair(**config)[0], make()
    weight = ours.get_base_model().lm_head.weight
    assert torch.equal(weight, base.lm_head.weight)
    assert weight is ours.get_base_model().model.embed_tokens.weight
    assert shared_storage(*parts_of(ours))
    changed = (ours(ids()) - base(ids())).abs().max().item()
    assert (changed > 0.01) == (init is False)


def test_rank_and_alpha_patterns_of_tied_layers_are_those_of_the_embedding():
    config = {"target_modules": ["lm_head"], "ensure_weight_tying": True}
    config |= {"rank_pattern": {"embed_tokens": 2, "lm_head": 5}, "alpha_pattern": {"lm_head": 3}}
    layer, head = parts_of(lk.get_peft_model(make(), lk.LoraConfig(**config)))
    assert (layer.r, layer.scaling["default"]) == (head.r, head.scaling["default"]) == ({"default": 2}, 4.0)
    assert shared_storage(layer, head)


@pytest.mark.parametrize("exact", [False, True])
def test_merging_tied_factors_adds_them_once_where_peft_adds_them_twice(exact):
    ours, theirs = pair(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
    equalize(ours, theirs)
    y, before = ours(ids()), [p.clone() for p in ours.parameters()]
    shared = parts_of(ours)[0].weight
    with pytest.warns(UserWarning, match=r"tied_target_modules=\['model.embed_tokens', 'lm_head'\]"):
        ours.merge_adapter(exact=exact)
    close(ours(ids()), y.double())
    ours.unmerge_adapter()
    assert parts_of(ours)[0].weight is parts_of(ours)[1].weight is shared
    rows = [torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True)]
    assert all(rows) if exact else rows[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, doubled = ours.merge_and_unload(), theirs.merge_and_unload()
    close(plain(ids()), y.double())
    assert plain.model.embed_tokens.weight is plain.lm_head.weight
    assert plain.config.tie_word_embeddings
    assert (doubled(ids()) - y).abs().max() > 0.1


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_merging_into_one_of_two_tied_layers_unties_them_where_peft_changes_both(targets, safe):
    ours, theirs = pair(target_modules=targets)
    equalize(ours, theirs)
    y = ours(ids())
    with pytest.warns(UserWarning, match="tied_target_modules") as record:
        plain = ours.merge_and_unload(safe_merge=safe)
    assert any("Setting `tie_word_embeddings=False` in the model config" in str(w.message) for w in record)
    close(plain(ids()), y.double())
    assert plain.config.tie_word_embeddings is False
    with pytest.warns(UserWarning, match="tied_target_modules"):
        theirs = theirs.merge_and_unload(safe_merge=safe)
    assert (theirs(ids()) - y).abs().max() > 0.1


@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"]])
def test_merging_without_tied_targets_warns_of_nothing(targets):
    ours, _ = pair(lambda: make(tied=targets == ["q_proj"], says_so=targets == ["q_proj"]), target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = ours.merge_and_unload()
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == (targets == ["q_proj"])


# Modules saved in full


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_tied_copies_have_one_weight(saved, tmp_path):
    config = {"target_modules": ["q_proj"], "modules_to_save": saved, "ensure_weight_tying": True}
    ours, theirs = pair(**config)
    equalize(ours, theirs)
    same(ours, theirs, (ids(),))
    gradients(ours, theirs, (ids(),))
    y = ours(ids())
    embedding, head = parts_of(ours)
    assert embedding.weight is head.weight is not embedding.original_module.weight
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for side in ("ours", "theirs"):
        for library in (lk, peft):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = library.PeftModel.from_pretrained(make(), str(tmp_path / side)).eval()
            close(loaded(ids()), y.double())
            assert parts_of(loaded)[0].weight is parts_of(loaded)[1].weight
    plain = ours.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    close(plain(ids()), y.double())


def test_a_tied_copy_of_a_head_keeps_its_bias_where_peft_drops_it(tmp_path):
    config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True}

    def base():
        return make(bias=True)

    ours = lk.get_peft_model(base(), lk.LoraConfig(**config))
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**config))
    close(ours(ids()), base()(ids()).double())
    assert (theirs(ids()) - base()(ids())).abs().max() > 0.01
    # The bias may be in a checkpoint, and need not.
    ours.get_base_model().lm_head.bias.data += 1
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for side, shift in (("ours", 1), ("theirs", 0)):
        loaded = lk.PeftModel.from_pretrained(base(), str(tmp_path / side))
        close(loaded(ids()), base()(ids()).double() + shift)
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours"))
    close(loaded(ids()), theirs(ids()).double())


# Encoder and decoder


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_copies_of_encoder_and_decoder_work_where_pefts_do_not(saved):
    config = {"target_modules": ["q_proj"], "modules_to_save": saved, "ensure_weight_tying": True}
    ours, theirs = pair(lambda: make("encoder-decoder"), **config)
    base = ours.get_base_model()
    wrappers = [base.shared, base.encoder.embed_tokens, base.decoder.embed_tokens, base.lm_head]
    assert all(isinstance(w, ModulesToSaveWrapper) and w.weight is base.shared.weight for w in wrappers)
    close(ours(ids()), make("encoder-decoder")(ids()).double())
    with pytest.raises(RuntimeError):
        theirs(ids())  # an output head in the place of an embedding


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_factors_of_encoder_and_decoder_are_tied_where_peft_ties_the_head_alone(targets, tmp_path):
    config = {"target_modules": ["q_proj", *targets], "ensure_weight_tying": True}
    ours, theirs = pair(lambda: make("encoder-decoder"), **config)
    pointers = []
    for model in (ours, theirs):
        base = model.get_base_model()
        embeddings = base.shared, base.encoder.embed_tokens, base.decoder.embed_tokens
        assert all(hasattr(layer, "lora_A") for layer in (*embeddings, base.lm_head))
        assert shared_storage(base.shared, base.lm_head)
        pointers.append(len({layer.lora_embedding_A["default"].data_ptr() for layer in embeddings}))
    assert pointers == [1, 3]
    # A checkpoint of peft, whose adapters differ, is loaded as it is.
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="they are loaded as they are"):
        loaded = lk.PeftModel.from_pretrained(make("encoder-decoder"), str(tmp_path)).eval()
    close(loaded(ids()), theirs(ids()).double())
    randomize(ours)
    y = ours(ids())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(make("encoder-decoder"), str(tmp_path)).eval()
        close(again(ids()), y.double())
        again = lk.PeftModel.from_pretrained(make("encoder-decoder"), str(tmp_path)).eval()
        close(again(ids()), y.double())
        plain = ours.merge_and_unload()
    close(plain(ids()), y.double())
    assert len({id(p) for p in (plain.shared.weight, plain.encoder.embed_tokens.weight, plain.lm_head.weight)}) == 1


@pytest.mark.parametrize(
    ("fields", "at_embedding", "at_head"),
    [
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, "lora_embedding_A.b", "lora_B.b.weight"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, *["modules_to_save.b.weight"] * 2),
    ],
)
def test_a_further_adapter_is_tied_where_peft_leaves_the_head_out(fields, at_embedding, at_head):
    for library, model in zip((lk, peft), pair(ensure_weight_tying=True, **fields), strict=True):
        model.add_adapter("b", library.LoraConfig(ensure_weight_tying=True, **fields))
        state = model.state_dict(keep_vars=True)
        embedding, head = f"base_model.model.model.embed_tokens.{at_embedding}", f"base_model.model.lm_head.{at_head}"
        assert embedding in state
        assert (head in state) is (library is lk)
        if library is lk:
            assert state[head].data_ptr() == state[embedding].data_ptr()


STEPS = {
    "both, one out": [("+", "h"), ("+", "e"), ("-", "h"), ("-", "e")],
    "both, other order": [("+", "e"), ("+", "h"), ("-", "e"), ("-", "h")],
    "head, switched": [("+", "h"), ("s", "h", "e"), ("-", "e")],
    "embedding, switched": [("+", "e"), ("s", "e", "h"), ("-", "h")],
    "back and forth": [("+", "h"), ("+", "e"), ("-", "h"), ("+", "h"), ("-", "e"), ("+", "e"), ("-", "h"), ("-", "e")],
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_tied_layers_are_merged_and_unmerged_in_any_order(steps, exact):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Embedding(20, 16), torch.nn.Linear(16, 20, bias=False))
    net[1].weight = net[0].weight
    config = {"r": 2, "init_lora_weights": False}
    model = lk.get_peft_model(net, lk.LoraConfig(target_modules=["0"], **config), "e").eval()
    model.add_adapter("h", lk.LoraConfig(target_modules=["1"], **config))
    layers = {"e": model.base_model.model[0], "h": model.base_model.model[1]}
    shared = layers["e"].weight
    original, deltas = shared.detach().clone(), {name: x.get_delta_weight(name).detach() for name, x in layers.items()}
    merged = set()
    for kind, *names in steps:
        if kind == "+":
            model.merge_adapter(names, exact=exact)
        elif kind == "-":
            model.unmerge_adapter(names)
        else:
            model.switch_adapter(*names)
        merged = {"+": merged | {*names}, "-": merged - {*names}, "s": {names[-1]}}[kind]
        for name, layer in layers.items():
            assert layer.merged_adapters == [name] * (name in merged)
            expected = original + deltas[name] if name in merged else original
            torch.testing.assert_close(layer.weight, expected, rtol=1e-5, atol=1e-5)
            if exact and name not in merged:
                assert torch.equal(layer.weight, original)
    assert layers["e"].weight is layers["h"].weight is shared
