"""``accelerate`` on models of real ``peft``: the same results and the same life, before, after and in between."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk

peft = pytest.importorskip("peft")
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402

from lora_kernels.integrations import measure  # noqa: E402
from lora_kernels.integrations.peft import Linear as OurLinear  # noqa: E402

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24, bias=False)
        self.up2 = nn.Linear(24, 40)
        self.head = nn.Linear(40, 6)

    def forward(self, x):
        return self.head(torch.tanh(self.up2(x + self.down(torch.tanh(self.up(x))))))


def fill(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "hada" in name or "ia3" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def made(*names, dtype=torch.float32, targets=("up", "down", "up2"), autocast_adapter_dtype=True, **config):
    """A PEFT model with filled adapters, the first one active."""
    torch.manual_seed(5)
    config = {"r": 5, "lora_alpha": 8, "target_modules": list(targets), **config}
    first, *others = names or ("default",)
    net = Net().to(dtype)
    wrapped = peft.get_peft_model(net, peft.LoraConfig(**config), first, autocast_adapter_dtype=autocast_adapter_dtype)
    for name in others:
        wrapped.add_adapter(name, peft.LoraConfig(**{**config, "r": 3}))
    return fill(wrapped)


def batch(dtype=torch.float32, rows=(4, 7)):
    return torch.randn(*rows, 24, generator=torch.Generator().manual_seed(9)).to(dtype)


def layers(model, cls=PeftLinear):
    return [module for module in model.modules() if isinstance(module, cls)]


def pair(*names, **config):
    """The same model as PEFT made it, and accelerated."""
    theirs = made(*names, **config)
    ours = copy.deepcopy(theirs)
    report = lk.accelerate(ours)
    assert len(report.replaced) == len(layers(ours, OurLinear)) == len(layers(theirs)) > 0
    return theirs, ours


def same(got, expected):
    assert got.dtype == expected.dtype
    tolerance = TOLERANCE[expected.dtype]
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * max(1.0, largest))


def same_step(theirs, ours, x, context=None):
    """Outputs and the gradients of all that trains, and of x."""
    results = []
    for model in (theirs, ours):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        if context is None:
            y = model(inputs)
        else:
            with context():
                y = model(inputs)
        y.float().square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((y.detach(), {**grads, "x": inputs.grad}))
    (y, grads), (our_y, our_grads) = results
    same(our_y, y)
    assert our_grads.keys() == grads.keys()
    assert len(grads) > 1
    for name, grad in grads.items():
        assert our_grads[name].dtype == grad.dtype
        if y.dtype == torch.float32:
            same(our_grads[name], grad)
        else:
            assert float((our_grads[name] - grad).norm()) <= 0.03 * float(grad.norm()), name
    return our_y


def paths(monkeypatch):
    """Counts the calls of PEFT's own forward."""
    calls = []
    forward = PeftLinear.forward
    monkeypatch.setattr(PeftLinear, "forward", lambda self, *a, **k: (calls.append(self), forward(self, *a, **k))[1])
    return calls


# Results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_adapters", [False, True])
def test_outputs_and_gradients(dtype, half_adapters, monkeypatch):
    theirs, ours = pair(dtype=dtype, autocast_adapter_dtype=not half_adapters)
    same_step(theirs, ours, batch(dtype))
    calls = paths(monkeypatch)
    with torch.inference_mode():
        for rows in ((1,), (), (2, 0), (2, 3, 4)):
            y = ours(batch(dtype, rows))
            assert not calls
            same(y, theirs(batch(dtype, rows)))
            calls.clear()


def test_several_active_adapters_and_none(monkeypatch):
    theirs, ours = pair("a", "b", "c")
    for active in (["a", "b"], ["c", "a", "b"], ["b"], "c"):
        for model in (theirs, ours):
            model.base_model.set_adapter(active)
        same_step(theirs, ours, batch())
    calls = paths(monkeypatch)
    ours.base_model.set_adapter(["a", "b"])
    ours(batch())
    assert not calls
    with ours.disable_adapter():
        torch.testing.assert_close(ours(batch()), ours.base_model.model.head(features(ours)), rtol=0, atol=0)
    ours.base_model.set_adapter("nobody")
    theirs.base_model.set_adapter("nobody")
    torch.testing.assert_close(ours(batch()), theirs(batch()), rtol=0, atol=0)


def features(model):
    net, x = model.base_model.model, batch()
    up, down, up2 = (layer.base_layer for layer in (net.up, net.down, net.up2))
    return torch.tanh(up2(x + down(torch.tanh(up(x)))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    theirs, ours = pair("a", "b", dtype=dtype)
    for active in (["a"], ["a", "b"]):
        for model in (theirs, ours):
            model.base_model.set_adapter(active)
        same_step(theirs, ours, batch(), lambda: torch.autocast("cpu", torch.bfloat16))


def test_float64_and_refused_input_are_left_to_peft():
    theirs = made().double()
    ours = copy.deepcopy(theirs)
    report = lk.accelerate(ours)
    assert not report.replaced
    assert "float64" in str(report)
    theirs, ours = pair()
    for model in (theirs, ours):
        model.double()  # after accelerate
    torch.testing.assert_close(ours(batch(torch.float64)), theirs(batch(torch.float64)), rtol=0, atol=0)
    theirs, ours = pair()
    with pytest.raises(RuntimeError):
        ours(batch(torch.bfloat16))


def test_dropout_is_ours_in_training_and_off_in_eval():
    theirs, ours = pair(lora_dropout=0.3, targets=("up",))
    x, layer = batch(rows=(1,)), layers(ours)[0]
    plain = layers(theirs)[0].eval()(x).detach()
    ours.train()
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), first, rtol=0, atol=0)
    assert not torch.allclose(layer(x), first)
    many = torch.stack([layer(x).detach() for _ in range(3000)])
    error = (many.mean(0) - plain).abs() / (many.std(0) / 3000**0.5)
    assert float(error.max()) < 5
    same(ours.eval()(x), theirs.eval()(x))


def test_scaling_follows_peft_at_each_call():
    theirs, ours = pair("a", "b")
    for change in (
        lambda layer: layer.set_scale("a", 3.0),
        lambda layer: layer.scale_layer(0.25),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.scaling.update(a=7),
        lambda layer: layer.scaling.update(a=torch.tensor(-1.5)),
    ):
        for model in (theirs, ours):
            for layer in layers(model):
                change(layer)
        same(ours(batch()), theirs(batch()))
    with peft.helpers.rescale_adapter_scale(theirs, 0.5), peft.helpers.rescale_adapter_scale(ours, 0.5):
        same(ours(batch()), theirs(batch()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_adapter_a_row(dtype, monkeypatch):
    theirs, ours = pair("a", "b", "c", dtype=dtype)
    theirs.eval(), ours.eval()
    names = ["b", "__base__", "a", "b"]
    with torch.no_grad():
        expected = theirs(batch(dtype), adapter_names=names)
        calls = paths(monkeypatch)
        same(ours(batch(dtype), adapter_names=names), expected)
        assert not calls
        same(ours(batch(dtype), adapter_names=["__base__"] * 4), theirs(batch(dtype), adapter_names=["__base__"] * 4))
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        ours(batch(dtype), adapter_names=["a"])
    with pytest.raises(ValueError, match="training mode"):
        ours.train()(batch(dtype), adapter_names=names)
    ours.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        ours(batch(dtype), adapter_names=names)


# The life of adapters


STEPS = [
    lambda m: m.merge_adapter(),
    lambda m: m.unmerge_adapter(),
    lambda m: m.set_adapter("b"),
    lambda m: m.base_model.set_adapter(["a", "b"]),
    lambda m: m.merge_adapter(["b"], safe_merge=True),
    lambda m: m.unmerge_adapter(),
    lambda m: m.add_adapter("d", peft.LoraConfig(r=2, target_modules=["up", "head"], init_lora_weights=False)),
    lambda m: m.set_adapter("d"),
    lambda m: m.delete_adapter("b"),
    lambda m: m.add_weighted_adapter(["a", "d"], [0.5, 2.0], "mix", combination_type="cat"),
    lambda m: m.set_adapter("mix"),
    lambda m: m.base_model.disable_adapter_layers(),
    lambda m: m.base_model.enable_adapter_layers(),
    lambda m: m.add_adapter("dora", peft.LoraConfig(r=2, target_modules=["up"], use_dora=True)),
    lambda m: m.set_adapter("dora"),
    lambda m: m.base_model.set_adapter(["dora", "a"]),
    lambda m: m.set_adapter("a"),
]


@pytest.mark.parametrize("again", [False, True])
def test_all_methods_of_peft_in_between(again):
    theirs, ours = pair("a", "b")
    for number, step in enumerate(STEPS):
        for model in (theirs, ours):
            torch.manual_seed(number)
            step(model)
        if again:  # accelerate picks up what is new, restore and accelerate come at any moment
            lk.restore(ours) if number % 3 == 1 else lk.accelerate(ours)
        same(ours(batch()), theirs(batch()))
        assert ours.get_layer_status() == theirs.get_layer_status()
        assert ours.get_model_status() == theirs.get_model_status()
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        same_trainable = [(n, p.requires_grad) for n, p in ours.named_parameters()]
        assert same_trainable == [(n, p.requires_grad) for n, p in theirs.named_parameters()]
    merged = ours.merge_and_unload()
    same(merged(batch()), theirs.merge_and_unload()(batch()))
    assert type(merged.up) is nn.Linear


def test_restore_undoes_it():
    model = made()
    before = {name: type(module) for name, module in model.named_modules()}
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    expected = model(batch())
    assert len(lk.accelerate(model).replaced) == 3
    model(batch())
    assert lk.accelerate(model).replaced
    assert lk.restore(model) == 3
    assert lk.restore(model) == 0
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys
    torch.testing.assert_close(model(batch()), expected, rtol=0, atol=0)


def test_save_load_deepcopy_and_pickle(tmp_path):
    theirs, ours = pair()
    ours.save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)
    same(loaded(batch()), theirs(batch()))
    lk.accelerate(loaded)
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    same(loaded(batch()), theirs(batch()))
    theirs.load_state_dict(ours.state_dict())
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert len(layers(copied, OurLinear)) == 3
        same(copied(batch()), theirs(batch()))
        assert lk.restore(copied) == 3


def test_training_loop_with_checkpointing():
    theirs, ours = pair()
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for step in range(12):
            x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
            run = checkpoint(model, x, use_reentrant=False) if step % 2 else model(x)
            loss = (run - x[:, :6]).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss))
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=1e-4)
    assert losses[1][-1] < losses[1][0]


def test_checkpointing_draws_the_same_mask():
    model = made(lora_dropout=0.4)
    lk.accelerate(model)
    x, grads = batch().requires_grad_(), []
    for run in (model, lambda v: checkpoint(model, v, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(3)
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_compiles_in_one_graph():
    theirs, ours = pair("a", "b", lora_dropout=0.2)
    theirs.eval(), ours.eval()
    run = torch.compile(ours, backend="aot_eager", fullgraph=True)
    same(run(batch()), theirs(batch()))
    run(batch()).square().sum().backward()
    for name in ("b", ["a", "b"]):
        for model in (theirs, ours):
            model.base_model.set_adapter(name)
        same(run(batch()), theirs(batch()))
    for layer in (*layers(ours), *layers(theirs)):
        layer.scale_layer(1.5)
    same(run(batch()), theirs(batch()))
    ours.train()
    assert torch.isfinite(run(batch())).all()
    lk.restore(ours.eval())
    same(run(batch()), theirs(batch()))
    torch._dynamo.reset()


# What is not ours


def test_hooks_fire_and_are_seen_inside():
    theirs, ours = pair()
    seen = []
    for model in (theirs, ours):
        net = model.base_model.model
        net.up.register_forward_hook(lambda m, i, o: (seen.append("layer"), o * 2)[1])
        net.up.base_layer.register_forward_hook(lambda m, i, o: seen.append("base"))
        net.down.lora_A["default"].register_forward_hook(lambda m, i, o: (seen.append("A"), o + 1)[1])
        net.down.lora_dropout["default"].register_forward_hook(lambda m, i, o: seen.append("dropout"))
        net.up2.lora_B["default"].register_full_backward_hook(lambda m, i, o: seen.append("B backward"))
    same_step(theirs, ours, batch())
    half = len(seen) // 2
    assert len(seen) == 10
    assert seen[:half] == seen[half:]


@pytest.mark.parametrize("config", [{"use_bdlora": "up"}, {"lora_bias": True}])
def test_variants_are_left(config):
    if "use_bdlora" in config:
        config = {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(target_modules_bd_a=["up"], nblocks=2), "r": 4}
    model = made(targets=("up", "up2"), **config)
    expected = model(batch())
    report = lk.accelerate(model)
    assert not report.replaced
    assert set(report.left) == {"base_model.model.up", "base_model.model.up2"}
    assert "variant" in str(report) or "a bias on lora_B" in str(report)
    torch.testing.assert_close(model(batch()), expected, rtol=0, atol=0)


def test_unusual_parts_run_peft(monkeypatch):
    theirs, ours = pair()
    for model in (theirs, ours):
        net = model.base_model.model
        net.up.lora_dropout["default"] = nn.AlphaDropout(0.1)
        net.down.lora_A["default"].bias = nn.Parameter(torch.ones(5))
        torch.nn.utils.parametrizations.weight_norm(net.up2.lora_B["default"])
    calls = paths(monkeypatch)
    same(ours.eval()(batch()), theirs.eval()(batch()))
    assert len(calls) == 6
    report = str(lk.accelerate(ours))
    assert "AlphaDropout" in report
    assert lk.restore(ours) == 3


def test_mixed_adapters_on_one_layer_are_remarked():
    model = made("a")
    model.add_adapter("biased", peft.LoraConfig(r=2, target_modules=["up"], lora_bias=True))
    report = lk.accelerate(model)
    assert len(report.replaced) == 3
    assert "PEFT's own forward for biased: a bias on lora_B" in str(report)


def test_other_tuners_and_mixed_models_are_left():
    loha = peft.get_peft_model(Net(), peft.LoHaConfig(r=2, target_modules=["up"], init_weights=False))
    report = lk.accelerate(loha)
    assert list(report.left.values()) == ["another method than LoRA"]
    assert not report.replaced

    mixed = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["up", "down"]), "a", mixed=True)
    mixed.add_adapter("b", peft.LoHaConfig(r=2, target_modules=["up"]))
    fill(mixed).set_adapter(["a", "b"])
    expected = mixed(batch())
    report = lk.accelerate(mixed)
    assert not report.replaced
    assert "part of a PeftMixedModel" in str(report)
    torch.testing.assert_close(mixed(batch()), expected, rtol=0, atol=0)

    two = peft.get_peft_model(Net(), peft.IA3Config(target_modules=["up"], feedforward_modules=["up"]))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["down"]), fill(two).base_model.model, "lora")
    expected = fill(two)(batch())
    report = lk.accelerate(two)
    assert len(report.replaced) == len(report.left) == 1
    same(two(batch()), expected)


def test_functional_transforms_and_subclasses_run_peft(monkeypatch):
    theirs, ours = pair()
    x = batch(rows=(6,))
    per_row = torch.func.vmap(lambda row: ours(row))
    calls = paths(monkeypatch)
    same(per_row(x), theirs(x))
    assert len(calls) == 6


# Reports and measurements


def test_report_text():
    report = lk.accelerate(made(targets=("up", "down", "up2")))
    text = str(report)
    assert text.startswith("accelerate: 3 layers replaced, 0 left")
    assert "2 x lora.Linear 24 -> 40, r = 5, float32 (base_model.model.up, ...)" in text
    assert "1 x lora.Linear 40 -> 24" in text
    assert "sample=batch" in text


@pytest.mark.parametrize("sample", [batch(), (batch(),), {"x": batch()}])
def test_sample_measures_and_puts_back_what_is_slower(sample, monkeypatch):
    clock = [0.0]  # only forwards take time: ours 2 to 7 ms a layer, PEFT's 5 ms
    ours, theirs = OurLinear.forward, PeftLinear.forward

    def takes(forward, milliseconds):
        def timed(self, x):
            clock[0] += milliseconds(self) / 1e3
            return forward(self, x)

        return timed

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(OurLinear, "forward", takes(ours, lambda layer: 7 if layer.in_features == 24 else 2))
    monkeypatch.setattr(PeftLinear, "forward", takes(theirs, lambda layer: 5))
    model = made(lora_dropout=0.1)
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_hook(lambda m, *_: m.calls.add_(1))
    state = torch.get_rng_state()
    report = lk.accelerate(model, sample=sample)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers(model))
    assert report.replaced == ["base_model.model.down"]
    assert report.left == {f"base_model.model.{name}": "not faster on this sample" for name in ("up", "up2")}
    assert "; 10.000 ms with peft, 14.000 ms with ours: not faster on this sample" in str(report)
    assert "; 5.000 ms with peft, 2.000 ms with ours (base_model.model.down)" in str(report)
    assert type(model.base_model.model.up) is PeftLinear
    assert type(model.base_model.model.down) is OurLinear


def test_sample_on_real_time():
    model = made()
    report = lk.accelerate(model.eval(), sample=batch())
    assert all(group.our_ms > 0 and group.peft_ms > 0 for group in report.groups)
    assert len(layers(model, OurLinear)) == len(report.replaced)


def test_failing_sample_leaves_the_model_as_it_was():
    model = made()
    with pytest.raises(RuntimeError):
        lk.accelerate(model, sample=torch.randn(2, 3))
    assert not layers(model, OurLinear)
    assert not any(layer._forward_hooks for layer in layers(model))


def test_bad_models_are_refused():
    for call in (lk.accelerate, lk.restore):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
            call("model")
    with pytest.raises(ValueError, match="no layer of peft"):
        lk.accelerate(Net())


def test_transformers_add_adapter_and_generate():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]), "one")
    fill(model)
    ids = torch.randint(1, 50, (2, 5))
    expected, text = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    assert len(lk.accelerate(model).replaced) == 6
    same(model(ids).logits, expected)
    torch.testing.assert_close(model.generate(ids, max_new_tokens=5, do_sample=False), text, rtol=0, atol=0)
    model.disable_adapters()
    base = model(ids).logits
    assert not torch.allclose(base, expected)
    model.enable_adapters()
    same(model(ids).logits, expected)
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
