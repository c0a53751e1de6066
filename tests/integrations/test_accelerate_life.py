"""``accelerate`` on models of real ``peft``: the same life, before, after and in between."""

import copy
import io
import pickle

import pytest
import torch
from accelerate_cases import Net, OurLinear, batch, layers, made, pair, peft, same, same_step
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk

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
