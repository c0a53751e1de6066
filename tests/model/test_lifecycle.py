"""The life of adapters in a model: any sequence of calls against plain torch, and failures half-way."""

import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from lora_kernels import ops
from lora_kernels.config import LoraConfig
from lora_kernels.layers import LoraLayer, ModulesToSaveWrapper
from lora_kernels.model import PeftModel, get_peft_model

from .models import Oracle, randomize, tiny, token_ids, weights, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = [["q_proj", "v_proj"], ["q_proj"], ["embed", "v_proj"], ["layers.1.q_proj", "head"]]
NAMES = ["a", "b", "c"]


class Lifecycle(RuleBasedStateMachine):
    """Names that are taken, unknown or merged are part of the game: each must raise and change nothing."""

    @initialize(where=st.sampled_from(TARGETS), seed=st.integers(0, 99))
    def start(self, where, seed):
        base = tiny(seed)
        self.oracle = Oracle(base)
        self.model = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=where), "a").eval()
        self._learn("a", seed)
        self.oracle.active = ["a"]

    def _learn(self, name, seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if "lora_" in key and f".{name}" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.oracle.learn(name, self.model)

    @rule(name=st.sampled_from(NAMES), where=st.sampled_from(TARGETS), r=st.integers(1, 5), seed=st.integers(0, 99))
    def add(self, name, where, r, seed):
        config = LoraConfig(r=r, lora_alpha=4, target_modules=where)
        if name in self.oracle.adapters:
            with pytest.raises(ValueError, match="taken"):
                self.model.add_adapter(name, config)
        else:
            self.model.add_adapter(name, config)
            self._learn(name, seed)

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    def choose(self, names):
        if set(names) - set(self.oracle.adapters):
            with pytest.raises(ValueError, match="no adapter"):
                self.model.set_adapter(names)
        else:
            self.model.set_adapter(names)
            self.oracle.active, self.oracle.merged = names, []

    @rule(names=st.none() | st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True), safe=st.booleans())
    def merge(self, names, safe):
        wanted = self.oracle.active if names is None else names
        if set(wanted) - set(self.oracle.adapters):
            with pytest.raises(ValueError, match="no adapter"):
                self.model.merge_adapter(names, safe_merge=safe)
        else:
            self.model.merge_adapter(names, safe_merge=safe)
            self.oracle.merged += [name for name in wanted if name not in self.oracle.merged]

    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        self.oracle.merged = []

    @rule(name=st.sampled_from(NAMES))
    def switch(self, name):
        known, merged = name in self.oracle.adapters, self.oracle.merged
        if known and merged and name not in merged:
            self.model.switch_adapter(name)
            self.oracle.active, self.oracle.merged = [name], [name]
        else:
            with pytest.raises(ValueError, match=r"no adapter|merge"):
                self.model.switch_adapter(name)

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name):
        if name in self.oracle.adapters and name not in self.oracle.merged:
            self.model.delete_adapter(name)
            del self.oracle.adapters[name]
            was_active = name in self.oracle.active
            self.oracle.active = [n for n in self.oracle.active if n != name]
            if was_active and not self.oracle.active:
                self.oracle.active = sorted(self.oracle.adapters)[:1]
        else:
            with pytest.raises(ValueError, match=r"no adapter|are merged"):
                self.model.delete_adapter(name)

    @rule(enabled=st.booleans())
    def enable(self, enabled):
        self.model.enable_adapter_layers() if enabled else self.model.disable_adapter_layers()
        self.oracle.disabled = not enabled

    @rule()
    def copy_whole(self):
        self.model = copy.deepcopy(self.model)

    @rule()
    def pickle_whole(self):
        self.model = pickle.loads(pickle.dumps(self.model))

    @precondition(lambda self: not self.oracle.merged)
    @rule(name=st.sampled_from(NAMES))
    def write_to_disk_and_back(self, name):
        import tempfile

        if name in self.oracle.adapters:
            with tempfile.TemporaryDirectory() as folder:
                self.model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
                path = folder if name == "default" else f"{folder}/{name}"
                training = self.model.training
                self.model.load_adapter(path, "from_disk")
                self.model.delete_adapter("from_disk")
                assert self.model.training == training

    @invariant()
    def agrees_with_plain_torch(self):
        assert set(self.model.peft_config) == set(self.oracle.adapters)
        assert self.model.active_adapters == self.oracle.active
        with torch.no_grad():
            torch.testing.assert_close(
                self.model(token_ids()).double(), self.oracle(token_ids()), rtol=2e-3, atol=2e-4, check_dtype=False
            )

    def teardown(self):
        if not hasattr(self, "model"):
            return
        self.model.enable_adapter_layers()
        self.oracle.disabled = False
        plain = self.model.merge_and_unload() if self.oracle.active else self.model.unload()
        assert not any(type(m).__module__.startswith("lora_kernels") for m in plain.modules())
        torch.testing.assert_close(plain(token_ids()).double(), self.oracle(token_ids()), rtol=2e-3, atol=2e-4)


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("op", ["merge", "unmerge", "switch"])
def test_failure_half_way_unwinds(monkeypatch, op, error):
    model = wrapped()
    if op != "merge":
        model.merge_adapter()
    before, expected = weights(model), model(token_ids())
    merged = [layer.merged_adapters for layer in model.base_model.lora_layers()]
    plain, calls = getattr(ops, f"{op}_"), []

    def failing(*args, **kwargs):
        calls.append(op)
        if len(calls) == 3:
            raise error
        return plain(*args, **kwargs)

    def refusing(weights, adapters):
        raise ValueError("one by one, then")

    monkeypatch.setattr(ops, f"{op}_", failing)
    monkeypatch.setattr(ops, "merge_list_", refusing)
    monkeypatch.setattr(ops, "unmerge_list_", refusing)
    with pytest.raises(type(error)):
        {"merge": model.merge_adapter, "unmerge": model.unmerge_adapter, "switch": lambda: model.switch_adapter("b")}[
            op
        ]()
    assert [layer.merged_adapters for layer in model.base_model.lora_layers()] == merged
    assert model.active_adapters == ["default"]
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(token_ids()), expected)


@pytest.mark.parametrize("op", ["merge", "unmerge"])
def test_a_model_is_merged_in_one_call_or_not_at_all(monkeypatch, op):
    model = wrapped()
    before, calls = weights(model), []
    expected = wrapped()
    for layer in expected.base_model.lora_layers():
        layer.merge()
    if op == "unmerge":
        model.merge_adapter()
    started, plain = weights(model), getattr(ops, f"{op}_list_")

    def counting(weights, adapters):
        calls.append(len(weights))
        if len(calls) == 1:
            raise KeyboardInterrupt
        plain(weights, adapters)

    monkeypatch.setattr(ops, f"{op}_list_", counting)
    run = getattr(model, f"{op}_adapter")
    with pytest.raises(KeyboardInterrupt):
        run()
    assert all(torch.equal(value, started[name]) for name, value in weights(model).items())
    assert all(bool(layer.merged_adapters) is (op == "unmerge") for layer in model.base_model.lora_layers())
    run()
    assert calls == [len(model.base_model.lora_layers())] * 2
    wanted = weights(expected) if op == "merge" else before
    for name, value in weights(model).items():
        torch.testing.assert_close(value, wanted[name], rtol=0 if op == "merge" else 1e-5, atol=1e-6)


def test_safe_merge_of_nan_touches_no_weight():
    model = wrapped()
    with torch.no_grad():
        model.base_model.lora_layers()[-1].lora_B["default"].weight[0, 0] = float("nan")
    before = weights(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"layers\.1\.v_proj"):
            call(safe_merge=True)
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
        assert isinstance(model.base_model.lora_layers()[0], LoraLayer)


def test_disable_adapter_is_a_context_and_nests():
    model, base = wrapped(modules_to_save=["head"]), tiny()
    expected = base(token_ids())
    model.merge_adapter()
    before = weights(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(token_ids()), expected)
        with model.disable_adapter():
            pass
        torch.testing.assert_close(model(token_ids()), expected)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert not torch.allclose(model(token_ids()), expected)


def test_unload_gives_back_the_very_model():
    base = tiny()
    modules = list(base.named_modules())
    expected = base(token_ids())
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "embed"]))
    assert model.unload() is base
    assert list(base.named_modules()) == modules
    assert torch.equal(base(token_ids()), expected)


def test_merge_and_unload_keeps_the_module_that_was_saved_in_full():
    model = wrapped(modules_to_save=["head"])
    expected = model(token_ids())
    plain = model.merge_and_unload(progressbar=True, safe_merge=True)
    torch.testing.assert_close(plain(token_ids()), expected)
    assert not any(isinstance(m, (LoraLayer, ModulesToSaveWrapper, PeftModel)) for m in plain.modules())
    assert type(plain.head) is nn.Linear


def test_unloaded_model_loads_where_this_package_is_not_installed(tmp_path):
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["3"]))
    randomize(model)
    ids = torch.arange(5)
    expected = model(ids)
    plain = model.merge_and_unload()
    torch.save({"model": plain, "ids": ids, "expected": expected.detach()}, tmp_path / "model.pt")
    code = f"""
        import sys
        sys.modules["lora_kernels"] = None
        import torch
        saved = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        torch.testing.assert_close(saved["model"](saved["ids"]), saved["expected"])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=tmp_path)


def test_modules_to_save_follow_the_active_adapter():
    model = wrapped(names=("default",), modules_to_save=["head"])
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"], modules_to_save=["head"]))
    model.add_adapter("c", LoraConfig(target_modules=["q_proj"]))
    wrapper = model.get_base_model().head
    for name, current in (("b", "b"), ("default", "default"), ("c", None)):
        model.set_adapter(name)
        chosen = wrapper.original_module if current is None else wrapper.modules_to_save[current]
        assert wrapper.weight is chosen.weight
        trainable = {n for n, m in wrapper.modules_to_save.items() if m.weight.requires_grad}
        assert trainable == {current} - {None}
    with pytest.raises(ValueError, match="only one"):
        model.set_adapter(["default", "b"])
    model.set_adapter("b")
    model.delete_adapter("default")
    assert list(wrapper.modules_to_save) == ["b"]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(copied(token_ids()), model(token_ids()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.add_adapter("default", LoraConfig(target_modules=["q_proj"])), "taken"),
        (lambda m: m.add_adapter("x.y", LoraConfig(target_modules=["q_proj"])), "adapter_name"),
        (lambda m: m.add_adapter("x", LoraConfig(target_modules=["nowhere"])), "nowhere"),
        (lambda m: m.set_adapter("x"), "no adapter"),
        (lambda m: m.set_adapter(["default", "x"]), "no adapter"),
        (lambda m: m.delete_adapter("x"), "no adapter"),
        (lambda m: m.merge_adapter(["x"]), "no adapter"),
        (lambda m: m.set_requires_grad("x"), "no adapter"),
        (lambda m: m.switch_adapter("b"), "no adapter is merged"),
    ],
)
def test_bad_calls_are_named_and_change_nothing(call, message):
    model = wrapped()
    tree, expected = list(model.named_modules()), model(token_ids())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        call(model)
    assert list(model.named_modules()) == tree
    assert list(model.peft_config) == ["default", "b"]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(token_ids()), expected)


def test_merging_twice_warns_and_deleting_merged_is_refused():
    model = wrapped()
    model.merge_adapter()
    before = weights(model)
    for call in (model.merge_adapter, lambda: model.merge_adapter(["default"])):
        with pytest.warns(UserWarning, match="All adapters are already merged"):
            call()
    for call in (lambda: model.delete_adapter("default"), lambda: model.switch_adapter("default")):
        with pytest.raises(ValueError, match="merged"):
            call()
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("targets", ["q_proj", "layers.0.q_proj"])
def test_merging_into_a_shared_weight_changes_only_its_own_layer(targets, exact):
    base = tiny()
    shared = base.layers[1].q_proj.weight = base.layers[0].q_proj.weight
    model = randomize(get_peft_model(base, LoraConfig(target_modules=[targets]))).eval()
    before, y = weights(model), model(token_ids())
    model.merge_adapter(exact=exact)
    torch.testing.assert_close(model(token_ids()), y)
    assert torch.equal(shared, before["base_model.model.layers.0.q_proj.base_layer.weight"])
    model.unmerge_adapter()
    assert torch.equal(model(token_ids()), y)
    layers = model.get_base_model().layers
    assert all(layer.q_proj.weight is shared for layer in layers)
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())


def test_a_failed_merge_leaves_a_shared_weight_shared(monkeypatch):
    base = tiny()
    shared = base.layers[1].q_proj.weight = base.layers[0].q_proj.weight
    model = randomize(get_peft_model(base, LoraConfig(target_modules=["q_proj"])))
    layers = [layer.q_proj for layer in model.get_base_model().layers]

    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(layers[1], "sum_to_merge", fail)
    with pytest.raises(RuntimeError, match="broken"):
        model.merge_adapter()
    assert all(layer.weight is shared and not layer.merged for layer in layers)
