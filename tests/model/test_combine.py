"""``add_weighted_adapter``: every scheme against PEFT's, and failures that leave nothing behind."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.layers import LoraLayer

from .models import randomize, tiny, token_ids

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
SCHEMES = [
    ("linear", {}),
    ("cat", {}),
    ("svd", {}),
    ("svd", {"svd_rank": 3, "svd_clamp": 0.9}),
    ("svd", {"svd_rank": 12, "svd_full_matrices": False}),
    ("ties", {"density": 0.4}),
    ("ties", {"density": 0.4, "majority_sign_method": "frequency"}),
    ("ties_svd", {"density": 0.3, "svd_rank": 5}),
    ("dare_linear", {"density": 1.0}),
    ("dare_ties", {"density": 1.0}),
    ("dare_linear_svd", {"density": 1.0}),
    ("dare_ties_svd", {"density": 1.0}),
    ("magnitude_prune", {"density": 0.5}),
    ("magnitude_prune_svd", {"density": 0.5}),
]


def model(package=lk, alpha=8, **values):
    where = [["q_proj", "embed"], ["q_proj", "v_proj"], ["v_proj"]]
    configs = [package.LoraConfig(r=4, lora_alpha=alpha, target_modules=t, **values) for t in where]
    made = package.get_peft_model(tiny(), configs[0], "a")
    for name, config in zip("bc", configs[1:], strict=True):
        made.add_adapter(name, config)
    return randomize(made).eval()


def updates(made, name):
    kinds = (LoraLayer, peft.tuners.lora.LoraLayer)
    layers = [(path, m) for path, m in made.named_modules() if isinstance(m, kinds) and name in m.r]
    return {path: layer.get_delta_weight(name).detach() for path, layer in layers}


@pytest.mark.parametrize("alpha", [4, 8])
@pytest.mark.parametrize(("scheme", "options"), SCHEMES)
def test_equals_peft(scheme, options, alpha):
    ours, theirs = model(alpha=alpha), model(peft, alpha=alpha)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for made in (ours, theirs):
        made.add_weighted_adapter(["a", "b", "c"], [0.7, -0.4, 1.3], "new", combination_type=scheme, **options)
        found.append(updates(made, "new"))
        config = made.peft_config["new"]
        assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern)[1:] == (config.r, {}, {})
    assert ours.peft_config["new"].r == theirs.peft_config["new"].r
    assert ours.peft_config["new"].target_modules == theirs.peft_config["new"].target_modules
    assert set(found[0]) == set(found[1])
    for path, update in found[0].items():
        torch.testing.assert_close(update, found[1][path], rtol=1e-4, atol=1e-5)
    assert ours.active_adapters == ["a"]
    assert not any(p.requires_grad for n, p in ours.named_parameters() if ".new" in n)


@pytest.mark.parametrize(("scheme", "options"), [("linear", {"exact": True}), ("cat", {}), ("svd", {"svd_rank": 12})])
@pytest.mark.parametrize("rslora", [False, True])
def test_exact_schemes_are_the_weighted_sum_of_the_updates(scheme, options, rslora):
    made = model(use_rslora=rslora)
    parts = [updates(made, name) for name in "abc"]
    made.add_weighted_adapter(["a", "b", "c"], [0.7, -0.4, 1.3], "new", combination_type=scheme, **options)
    for path, update in updates(made, "new").items():
        wanted = sum(w * part[path].double() for w, part in zip([0.7, -0.4, 1.3], parts, strict=True) if path in part)
        torch.testing.assert_close(update.double(), wanted, rtol=1e-4, atol=1e-5)


def relative_error(package, weights, **options):
    made = model(package, use_rslora=options.pop("use_rslora", False))
    parts = [updates(made, name) for name in "ab"]
    made.add_weighted_adapter(["a", "b"], weights, "new", **options)
    path = next(p for p in updates(made, "new") if p.endswith("q_proj"))
    wanted = sum(w * part[path] for w, part in zip(weights, parts, strict=True))
    return ((updates(made, "new")[path] - wanted).norm() / wanted.norm()).item()


def test_linear_has_cross_terms_in_peft_and_exact_has_none():
    assert relative_error(peft, [1.0, -1.0], combination_type="linear") > 0.5
    assert relative_error(lk, [1.0, -1.0], combination_type="linear") > 0.5
    assert relative_error(lk, [1.0, -1.0], combination_type="linear", exact=True) < 1e-5


def test_rank_stabilised_scaling_is_counted_once():
    assert relative_error(peft, [1.0, 1.0], combination_type="cat", use_rslora=True) > 0.5
    assert relative_error(lk, [1.0, 1.0], combination_type="cat", use_rslora=True) < 1e-5


def test_scaling_is_counted_once_in_an_svd():
    assert relative_error(lk, [1.0, 1.0], combination_type="svd", svd_rank=8) < 1e-5


def test_dare_keeps_the_expectation():
    made = model()
    parts = updates(made, "a")
    torch.manual_seed(0)
    total = 0
    for i in range(60):
        made.add_weighted_adapter(["a", "b"], [1.0, 0.0], f"n{i}", combination_type="dare_linear_svd", density=0.5)
        total = total + updates(made, f"n{i}")["base_model.model.layers.0.q_proj"]
    wanted = parts["base_model.model.layers.0.q_proj"]
    assert (total / 60 - wanted).norm() / wanted.norm() < 0.5


def test_a_name_that_is_taken_does_nothing():
    made = model()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    assert made.add_weighted_adapter(["a"], [1.0], "b") is None
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


@pytest.mark.parametrize(
    ("adapters", "weights", "options", "error", "message"),
    [
        (["a", "x"], [1, 1], {}, ValueError, "Adapter x does not exist"),
        (["a", "b"], [1], {}, ValueError, "weights: expected 2"),
        ([], [], {}, ValueError, "Found no adapter"),
        (["a", "b"], [1, 1], {"combination_type": "mean"}, ValueError, "Invalid combination_type: mean"),
        (["a", "b"], [1, 1], {"combination_type": "ties"}, TypeError, "density"),
        (["a", "b"], [1, 1], {"combination_type": "ties", "density": -0.1}, ValueError, "Density should be >= 0"),
        (["a", "b"], [1, 1], {"combination_type": "dare_ties", "density": 0.0}, ValueError, "density"),
        (
            ["a", "b"],
            [1, 1],
            {"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"},
            RuntimeError,
            "mask method",
        ),
        (["a", "wide"], [1, 1], {"combination_type": "linear"}, ValueError, "same r value"),
        (["a", "regex"], [1, 1], {}, ValueError, "same target modules type"),
        (["a", "b"], [1, 1], {"exact": True}, ValueError, "exact"),
    ],
)
def test_a_failing_call_leaves_nothing_behind(adapters, weights, options, error, message):
    made = model()
    made.add_adapter("wide", lk.LoraConfig(r=6, target_modules=["q_proj"]))
    made.add_adapter("regex", lk.LoraConfig(r=4, target_modules=r".*q_proj"))
    before = set(made.state_dict())
    with pytest.raises(error, match=message):
        made.add_weighted_adapter(adapters, weights, "new", **options)
    assert set(made.state_dict()) == before
    assert "new" not in made.peft_config


def test_modules_saved_in_full_by_two_are_refused():
    made = lk.get_peft_model(tiny(), lk.LoraConfig(target_modules=["q_proj"], modules_to_save=["head"]), "a")
    made.add_adapter("b", lk.LoraConfig(target_modules=["q_proj"], modules_to_save=["head"]))
    with pytest.raises(ValueError, match="found 1 such instance"):
        made.add_weighted_adapter(["a", "b"], [1, 1], "new")


def test_patterns_of_the_first_adapter_do_not_hide_the_layers_of_another():
    first = lk.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layers")
    made = lk.get_peft_model(tiny(), first, "a")
    made.add_adapter("b", lk.LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"layers.1.q_proj": 2}))
    randomize(made).eval()
    made.add_weighted_adapter(["a", "b"], [0.0, 1.0], "new", combination_type="cat")
    made.set_adapter("b")
    wanted = made(token_ids())
    made.set_adapter("new")
    torch.testing.assert_close(made(token_ids()), wanted)


def test_an_svd_of_a_layer_narrower_than_the_rank_works_where_peft_fails():
    ids = token_ids()
    for package in (lk, peft):
        config = package.LoraConfig(r=8, target_modules=["head"])  # 16 -> 5
        made = package.get_peft_model(tiny(), config, "a")
        made.add_adapter("b", config)
        randomize(made).add_weighted_adapter(["a", "b"], [0.5, -0.4], "new", combination_type="svd")
        parts = [updates(made, name)["base_model.model.head"] for name in "ab"]
        expected = 0.5 * parts[0] - 0.4 * parts[1]
        made.set_adapter("new")
        if package is peft:
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                made(ids)
            continue
        torch.testing.assert_close(updates(made, "new")["base_model.model.head"], expected, rtol=1e-4, atol=1e-5)
        assert made(ids).shape == (3, 4, 5)


def grouped(package):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Conv1d(8, 6, 3, groups=2))
    made = package.get_peft_model(base, package.LoraConfig(r=4, target_modules=["0"]), "a")
    made.add_adapter("b", package.LoraConfig(r=4, target_modules=["0"]))
    return randomize(made).eval()


@pytest.mark.parametrize("scheme", ["linear", "ties", "magnitude_prune"])
def test_convolutions_with_groups_are_mixed_as_in_peft(scheme):
    outputs = []
    for package in (lk, peft):
        made = grouped(package)
        made.add_weighted_adapter(["a", "b"], [0.5, -0.4], "new", combination_type=scheme, density=0.5)
        made.set_adapter("new")
        outputs.append(made(torch.ones(2, 8, 5)))
    torch.testing.assert_close(*outputs)


def test_ranks_of_convolutions_with_groups_are_not_put_side_by_side_where_peft_pairs_those_of_other_groups():
    x = torch.ones(2, 8, 5)
    for package in (lk, peft):
        made = grouped(package)
        with made.disable_adapter():
            sums = made(x)
        for name, weight in (("a", 0.5), ("b", -0.4)):
            made.set_adapter(name)
            with torch.no_grad():
                parts = made(x)
                with made.disable_adapter():
                    sums = sums + weight * (parts - made(x))
        if package is lk:
            for scheme in ("cat", "svd"):
                with pytest.raises(ValueError, match=f"'{scheme}' can not combine a convolution with groups"):
                    made.add_weighted_adapter(["a", "b"], [0.5, -0.4], "new", combination_type=scheme)
            assert list(made.peft_config) == ["a", "b"]
            continue
        made.add_weighted_adapter(["a", "b"], [0.5, -0.4], "new", combination_type="cat")
        made.set_adapter("new")
        assert (made(x) - sums).abs().max() > 0.1


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_combining_adapters_that_started_from_the_weight_leaves_it_alone_where_peft_takes_a_part_out_of_it(init):
    ours, theirs = (model(package, init_lora_weights=init, alpha=8) for package in (lk, peft))
    for made in (ours, theirs):
        weight = made.base_model.model.layers[0].v_proj.base_layer.weight
        before = weight.detach().clone()
        made.add_weighted_adapter(["b", "c"], [0.5, -0.4], "new", combination_type="linear")
        assert torch.equal(weight, before) if made is ours else (weight - before).abs().max() > 0.01
