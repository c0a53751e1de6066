"""Where PEFT is silently wrong: its result and ours, side by side. The rows of DIFFERENCES.md point here."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk

from .models import randomize, tiny, token_ids

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def both(names=("a",), dtype=torch.float32, **config):
    """The same model and adapters, of PEFT and of ours."""
    config = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 12, **config}
    made = []
    for package in (peft, lk):
        model = package.get_peft_model(tiny(dtype=dtype), package.LoraConfig(**config), names[0])
        for name in names[1:]:
            model.add_adapter(name, package.LoraConfig(**config))
        made.append(randomize(model).eval())
    return made


def weight(model):
    return model.base_model.model.layers[0].q_proj.base_layer.weight.detach().clone()


def output(model):
    with torch.no_grad():
        return model(token_ids())


def test_a_forward_while_disabled_keeps_a_merged_weight():
    """PEFT takes the update out to answer, and does not put it back: bf16 weights lose bits for good."""
    theirs, ours = both(dtype=torch.bfloat16)
    original = weight(theirs)
    for model in (theirs, ours):
        model.merge_adapter()
    merged = weight(ours)
    for model in (theirs, ours):
        with model.disable_adapter():
            output(model)
    assert torch.equal(weight(ours), merged)
    assert not torch.equal(weight(theirs), merged)
    assert (weight(theirs) != original).float().mean() > 0.01


def test_choosing_an_adapter_on_a_merged_model_can_keep_every_bit():
    """Both take the update out first; after an exact merge that gives every bit of the weight back."""
    theirs, ours = both(("a", "b"), torch.bfloat16)
    original = weight(ours)
    theirs.merge_adapter()
    ours.merge_adapter(exact=True)
    for model in (theirs, ours):
        model.set_adapter("b")
    assert torch.equal(weight(ours), original)
    assert (weight(theirs) != original).float().mean() > 0.01


def test_active_adapters_that_are_not_merged_take_part():
    """PEFT drops them from the result without a word."""
    theirs, ours = both(("a", "b"))
    for model in (theirs, ours):
        model.base_model.set_adapter(["a", "b"])
    expected = output(theirs)
    for model in (theirs, ours):
        model.merge_adapter(adapter_names=["a"])
    torch.testing.assert_close(output(ours), expected, rtol=1e-4, atol=1e-4)
    assert (output(theirs) - expected).norm() > 0.1 * expected.norm()


def test_set_scale_while_merged_does_not_change_what_is_taken_out():
    theirs, ours = both()
    before = weight(ours)
    for model in (theirs, ours):
        model.merge_adapter()
        model.base_model.model.layers[0].q_proj.set_scale("a", 0.5)
        model.unmerge_adapter()
    assert (weight(ours) - before).norm() < 1e-5 * before.norm()
    assert (weight(theirs) - before).norm() > 0.1 * before.norm()


def test_unknown_adapter_names_are_refused():
    theirs, ours = both()
    theirs.base_model.set_adapter("typo")  # and nothing is active any more
    with pytest.raises(ValueError, match="typo"):
        ours.base_model.set_adapter("typo")
    assert ours.active_adapters == ["a"]


def test_max_norm_of_an_embedding_leaves_lora_a_alone():
    made = []
    for package in (peft, lk):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(11, 8, max_norm=1.0))
        model = package.get_peft_model(net, package.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
        made.append(model.eval())
    made[1].load_state_dict(made[0].state_dict())
    a = [model.base_model.model[0].lora_embedding_A["default"].detach().clone() for model in made]
    for model in made:
        output(model)
    after = [model.base_model.model[0].lora_embedding_A["default"].detach() for model in made]
    assert torch.equal(after[1], a[1])
    assert (after[0] - a[0]).norm() > 0.1 * a[0].norm()


def test_an_svd_of_the_sum_counts_scaling_once():
    """Up to 0.20, PEFT counted it twice."""
    theirs, ours = both(("a", "b"))
    layers = [model.base_model.model.layers[0].q_proj for model in (theirs, ours)]
    expected = layers[1].get_delta_weight("a") + layers[1].get_delta_weight("b")
    for model in (theirs, ours):
        # Nothing is pruned, so that what is left is the sum alone; alpha / r is 3 here.
        options = {"combination_type": "magnitude_prune_svd", "density": 1.0, "svd_rank": 8}
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", **options)
    theirs_delta, ours_delta = (layer.get_delta_weight("sum") for layer in layers)
    assert (ours_delta - expected).norm() < 1e-4 * expected.norm()
    assert (theirs_delta - expected).norm() < 1e-4 * expected.norm()


def test_missing_tensors_are_no_warning(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs, _ = both(("default",))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop("base_model.model.layers.0.q_proj.lora_B.weight")
    tensors["base_model.model.layers.1.q_proj.lora_B.weight"].fill_(float("nan"))
    save_file(tensors, path)
    assert output(peft.PeftModel.from_pretrained(tiny(), tmp_path)).isnan().any()
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"missing .*0\.q_proj\.lora_B\.weight.*1\.q_proj\.lora_B\.weight: holds Inf"):
        lk.PeftModel.from_pretrained(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()


def test_scale_layer_reaches_embeddings():
    theirs, ours = both(target_modules=["embed"])
    layers = [model.base_model.model.embed for model in (theirs, ours)]
    for layer in layers:
        layer.scale_layer(0.5)
    assert [layer.scaling["a"] for layer in layers] == [3.0, 1.5]
    for layer in layers:
        layer.unscale_layer()
    assert [layer.scaling["a"] for layer in layers] == [3.0, 3.0]


@pytest.mark.parametrize("kind", ["parametrization", "weight_norm", "weight_norm of old"])
def test_merging_into_a_weight_that_is_computed_is_refused_where_peft_loses_the_update(kind):
    norms = {
        "parametrization": torch.nn.utils.parametrizations.orthogonal,
        "weight_norm": torch.nn.utils.parametrizations.weight_norm,
        "weight_norm of old": torch.nn.utils.weight_norm,
    }
    for package in (peft, lk):
        base = tiny()
        base.layers[1].q_proj = norms[kind](base.layers[1].q_proj)
        config = package.LoraConfig(target_modules=["q_proj"], r=4)
        model = randomize(package.get_peft_model(base, config)).eval()
        wanted, before = model(token_ids()), {k: t.clone() for k, t in model.state_dict().items()}
        if package is peft:
            model.merge_adapter()
            assert (model(token_ids()) - wanted).abs().max() > 0.05
            continue
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=r"computed \(parametrized\) weight"):
                merge()
            assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
        torch.testing.assert_close(model(token_ids()), wanted)
