"""Rows of DIFFERENCES.md about calls: what ``peft`` does and what we do."""

import importlib
import re

import pytest
import torch
from torch import nn

import lora_kernels as lk

from .models import randomize, tiny, token_ids

peft = pytest.importorskip("peft")


def wrapped(package, model=None, **config):
    config = {"target_modules": ["q_proj", "v_proj"], "r": 4, **config}
    return randomize(package.get_peft_model(tiny() if model is None else model, package.LoraConfig(**config)).eval())


def hotswap(package):
    return importlib.import_module(f"{package.__name__}.utils.hotswap")


def test_a_list_of_adapters_on_the_wrapped_model():
    models = [wrapped(package) for package in (peft, lk)]
    for package, model in zip((peft, lk), models, strict=True):
        model.add_adapter("b", package.LoraConfig(target_modules=["q_proj"], r=2))
        randomize(model)
    with pytest.raises(TypeError):
        models[0].set_adapter(["default", "b"])
    models[0].base_model.set_adapter(["default", "b"])
    models[1].set_adapter(["default", "b"])
    torch.testing.assert_close(models[1](token_ids()), models[0](token_ids()), rtol=1e-4, atol=1e-5)


def test_loading_beside_an_older_adapter_of_the_name_is_refused(tmp_path):
    for package in (peft, lk):
        model, wrapper = tiny(), wrapped(package)
        wrapper.save_pretrained(tmp_path / package.__name__)
        before = wrapped(package, model, target_modules=["head", "q_proj"])(token_ids())
        if package is peft:
            loaded = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
            assert not torch.allclose(loaded(token_ids()), wrapper(token_ids()))  # the adapter of head takes part
        else:
            with pytest.raises(ValueError, match=r"has adapters already, one of the name 'default' .*\(head\)"):
                lk.PeftModel.from_pretrained(model, tmp_path / "lora_kernels")
            assert torch.equal(model(token_ids()), before)


def test_loading_onto_a_wrapped_model_is_refused(tmp_path):
    """PEFT finds none of the tensors in a wrapper's wrapper, and says so in a warning alone."""
    for package in (peft, lk):
        wrapper = wrapped(package)
        wrapper.save_pretrained(tmp_path / package.__name__)
        expected, inner = wrapper(token_ids()), wrapped(package, r=2)
        if package is peft:
            assert not torch.allclose(peft.PeftModel.from_pretrained(inner, tmp_path / "peft")(token_ids()), expected)
        else:
            before = inner(token_ids())
            with pytest.raises(ValueError, match="has adapters already"):
                lk.PeftModel.from_pretrained(inner, tmp_path / "lora_kernels")
            assert torch.equal(inner(token_ids()), before)


def test_biases_of_b_are_summed_in_combinations():
    found = {}
    for package in (peft, lk):
        model = wrapped(package, target_modules=["q_proj"], lora_bias=True)
        model.add_adapter("b", package.LoraConfig(target_modules=["q_proj"], r=4, lora_bias=True))
        randomize(model)
        model.add_weighted_adapter(["default", "b"], [0.5, 2.0], "sum", "cat")
        layer = model.base_model.model.layers[0].q_proj
        wanted = sum(w * layer.scaling[n] * layer.lora_B[n].bias for n, w in (("default", 0.5), ("b", 2.0)))
        bias = layer.lora_B["sum"].bias * layer.scaling["sum"]
        found[package] = (bias - wanted).norm() / wanted.norm()
    assert found[peft] > 0.1
    assert found[lk] < 1e-6


def test_a_magnitude_of_zero_is_not_merged():
    for package in (peft, lk):
        model = wrapped(package, target_modules=["q_proj"], use_dora=True)
        layer = model.base_model.model.layers[0].q_proj
        layer.lora_magnitude_vector["default"].weight.data[3] = 0.0
        weight = layer.weight.detach().clone()
        if package is peft:
            model.merge_adapter()
            assert not layer.weight[3].any()
            model.unmerge_adapter()
            assert not layer.weight[3].isfinite().all()
        else:
            with pytest.raises(ValueError, match="magnitude of 0"):
                model.merge_adapter()
            assert torch.equal(layer.weight, weight)


def test_scalings_stay_numbers_when_prepared_for_hot_swapping():
    for package, kind in ((peft, torch.Tensor), (lk, float)):
        model = wrapped(package)
        hotswap(package).prepare_model_for_compiled_hotswap(model)
        assert isinstance(model.base_model.model.layers[0].q_proj.scaling["default"], kind)


def test_a_module_to_save_named_like_the_adapter():
    with pytest.raises(ValueError, match="trying to target a module with"):
        peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["foo"]), "foo")
    with pytest.warns(RuntimeWarning, match=re.escape("modules_to_save: ['foo'] matched nothing")):
        lk.get_peft_model(tiny(), lk.LoraConfig(target_modules=["q_proj"], modules_to_save=["foo"]), "foo")


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=2)

    def forward(self, x):
        return self.conv(x)


def test_hot_swapping_a_grouped_convolution_equals_peft(tmp_path):
    x = torch.randn(2, 4, 6, 6)
    outputs = []
    for package in (peft, lk):
        torch.manual_seed(0)
        small = wrapped(package, Grouped(), target_modules=["conv"], r=2)
        small.save_pretrained(tmp_path / package.__name__)
        torch.manual_seed(0)
        model = wrapped(package, Grouped(), target_modules=["conv"], r=4)
        before = model(x)
        hotswap(package).prepare_model_for_compiled_hotswap(model, target_rank=8)
        torch.testing.assert_close(model(x), before)
        hotswap(package).hotswap_adapter(model, str(tmp_path / package.__name__), "default")
        torch.testing.assert_close(model(x), small(x))
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)


def test_inputs_are_not_cast_to_the_dtype_of_the_factors():
    """Half-precision factors that hooks widen for their forward, as offloading does."""
    x, outputs = torch.randn(3, 6), {}
    for package, cast_free in ((peft, True), (peft, False), (lk, False)):
        torch.manual_seed(0)
        model = package.get_peft_model(nn.Sequential(nn.Linear(6, 4)), package.LoraConfig(target_modules=["0"], r=2))
        layer = model.base_model.model[0]
        for factor, value in ((layer.lora_A["default"], 0.25), (layer.lora_B["default"], 0.5)):
            nn.init.constant_(factor.weight, value)
            factor.half()
            factor.register_forward_pre_hook(lambda module, inputs: module.float() and None)
        if package is peft and not cast_free:
            with pytest.raises(RuntimeError, match="dtype"):
                model(x)
            continue
        with package.helpers.disable_input_dtype_casting(model, active=cast_free):
            outputs[package.__name__] = model(x).detach()
    torch.testing.assert_close(outputs["lora_kernels"], outputs["peft"])


def test_names_of_adapters_with_a_slash_are_refused(tmp_path):
    for package in (peft, lk):
        wrapper = wrapped(package)
        wrapper.save_pretrained(tmp_path / package.__name__)
        if package is peft:
            wrapper.load_adapter(tmp_path / "peft", "org/name")
        else:
            with pytest.raises(ValueError, match="expected a name without"):
                wrapper.load_adapter(tmp_path / "lora_kernels", "org/name")


def test_dropout_of_a_new_adapter_follows_the_base():
    """PEFT's is on until ``eval()`` is called, though transformers gives models that are in eval mode."""
    torch.manual_seed(0)
    same = []
    for package in (peft, lk):
        config = package.LoraConfig(target_modules=["q_proj"], r=4, lora_dropout=0.5, init_lora_weights=False)
        model = package.get_peft_model(tiny().eval(), config)
        same.append(torch.equal(model(token_ids()), model(token_ids())))
        model.train()
        assert not torch.equal(model(token_ids()), model(token_ids()))
    assert same == [False, True]


def test_second_derivatives_and_function_transforms_are_refused():
    for package in (peft, lk):
        config = package.LoraConfig(target_modules=["0"], r=2)
        model, x = package.get_peft_model(nn.Sequential(nn.Linear(8, 4)), config), torch.randn(3, 8, requires_grad=True)
        for call in (
            lambda m=model, x=x: torch.autograd.grad(m(x).square().sum(), x, create_graph=True),
            lambda m=model, x=x: torch.func.jacrev(m)(x.detach()),
            lambda m=model, x=x: torch.func.jvp(m, (x.detach(),), (x.detach(),)),
        ):
            if package is peft:
                call()
            else:
                with pytest.raises(RuntimeError):
                    call()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_traced_has_no_gradients():
    found = []
    for package in (peft, lk):
        config = package.LoraConfig(target_modules=["0"], r=2)
        model = package.get_peft_model(nn.Sequential(nn.Linear(8, 4)), config).base_model.model
        y = torch.jit.trace(model, (torch.randn(3, 8),))(torch.randn(3, 8))
        if package is peft:
            y.sum().backward()
        else:
            with pytest.warns(UserWarning, match="lora_linear: an autograd kernel was not registered"):
                y.sum().backward()
        found.append(model[0].lora_B["default"].weight.grad is not None)
    assert found == [True, False]


def trained_of(model):
    """The adapters that have a parameter which trains."""
    return {name.split(".")[-2] for name, p in model.named_parameters() if "lora_" in name and p.requires_grad}


def test_adding_adapters_leaves_a_merged_model_merged():
    merged = []
    for package in (peft, lk):
        model = wrapped(package)
        model.merge_adapter()
        expected = model(token_ids())
        model.add_adapter("b", package.LoraConfig(target_modules=["q_proj"], r=2))
        torch.testing.assert_close(model(token_ids()), expected, rtol=1e-4, atol=1e-4)
        merged.append(model.get_model_status().merged_adapters)
    assert merged == [[], ["default"]]


def test_merging_an_unknown_adapter_is_refused():
    for package in (peft, lk):
        model = wrapped(package)
        if package is peft:
            model.merge_adapter(["other"])
        else:
            with pytest.raises(ValueError, match="other"):
                model.merge_adapter(["other"])
        assert model.get_model_status().merged_adapters == []


def test_a_dropout_of_one_is_refused():
    for package in (peft, lk):
        if package is peft:
            package.LoraConfig(lora_dropout=1.0)
        else:
            with pytest.raises(ValueError, match="lora_dropout"):
                package.LoraConfig(lora_dropout=1.0)


def test_wrapping_again_freezes_the_adapter_before():
    found = []
    for package in (peft, lk):
        base = tiny()
        for name in ("first", "second"):
            model = package.get_peft_model(base, package.LoraConfig(target_modules=["q_proj"], r=2), name)
        found.append(trained_of(model))
    assert found == [{"first", "second"}, {"second"}]


def test_after_deleting_the_active_adapter_the_next_has_its_own_module():
    outputs = []
    for package in (peft, lk):
        torch.manual_seed(0)
        model = wrapped(package)
        model.add_adapter("b", package.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["head"]))
        randomize(model)
        model.set_adapter("b")
        expected = model(token_ids())
        model.set_adapter("default")
        model.delete_adapter("default")
        outputs.append(torch.allclose(model(token_ids()), expected, rtol=1e-4, atol=1e-4))
    assert outputs == [False, True]


def test_factors_of_an_embedding_in_half_precision_are_as_frozen_as_others():
    found = []
    for package in (peft, lk):
        config = package.LoraConfig(target_modules=["embed", "q_proj"], r=2, inference_mode=True)
        model = package.get_peft_model(tiny(dtype=torch.bfloat16), config)
        found.append({name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad})
    assert found == [{"lora_embedding_A", "lora_embedding_B"}, set()]


def test_outputs_of_embeddings_require_gradients_when_that_is_asked_for():
    found = []
    for package in (peft, lk):
        base = tiny()
        embed = base.embed
        base.get_input_embeddings = lambda embed=embed: embed
        model = package.get_peft_model(base, package.LoraConfig(target_modules=["q_proj"], inference_mode=True))
        before = model(token_ids()).requires_grad
        model.prepare_model_for_gradient_checkpointing(base)
        found.append((before, model(token_ids()).requires_grad))
    assert found == [(True, True), (False, True)]
