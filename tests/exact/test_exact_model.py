"""Exact merges over a model: stacks, switches, copies, and interrupts at any moment, to the last bit."""

import copy
import pickle
import signal
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from exact_cases import BF16, F32, same_bits
from torch import nn

import lora_kernels as lk
from lora_kernels.demo.model import PACKAGE
from lora_kernels.layers.atomic import all_or_none, signals_wait

FILES = {str(Path(lk.__file__).parent / name) for name in ("merging.py", "layers/merged.py", "layers/atomic.py",
                                                           "ops/exact/api.py", "ops/merge/api.py")}  # fmt: skip


@pytest.fixture(autouse=True)
def interrupts_raise():
    """KeyboardInterrupt on SIGINT, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Tiny(nn.Module):
    """Token ids (batch, length) -> logits (batch, length, 5)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.first, self.second, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, ids):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(self.embed(ids))))))


def tiny(dtype=BF16, **options):
    """Adapters a (embed, first), b (first, second), c (all linear layers), each of another rank; a is active."""
    torch.manual_seed(0)
    model = Tiny().to(dtype)
    targets = {"a": ["embed", "first"], "b": ["first", "second"], "c": ["first", "second", "head"]}
    for r, (name, modules) in enumerate(targets.items(), 3):
        config = lk.LoraConfig(r=r, lora_alpha=2 * r + 1, target_modules=modules, init_lora_weights=False, **options)
        if name == "a":
            model = lk.get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    return model.eval()


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


def all_same(left, right):
    return all(same_bits(left[name], right[name]) for name in left)


def after(*names, dtype=BF16):
    model = tiny(dtype)
    model.merge_adapter(list(names), exact=True)
    return weights(model)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_there_and_back_through_copies(dtype):
    model = tiny(dtype)
    before, expected = weights(model), model(torch.arange(11))
    model.merge_adapter(exact=True)
    model.merge_adapter(["b", "c"], exact=True)
    assert not all_same(weights(model), before)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    model.unmerge_adapter(["b"])
    assert all_same(weights(model), after("a", "c", dtype=dtype))
    model.unmerge_adapter(["a"])
    assert all_same(weights(model), after("c", dtype=dtype))
    model.unmerge_adapter()
    assert all_same(weights(model), before)
    assert torch.equal(model(torch.arange(11)), expected)


def test_set_adapter_unmerges_exactly():
    model = tiny()
    before = weights(model)
    model.merge_adapter(["a", "c"], exact=True)
    with pytest.warns(UserWarning, match="unmerged first"):
        model.set_adapter("b")
    assert all_same(weights(model), before)


def test_switch():
    model = tiny()
    before = weights(model)
    model.merge_adapter(exact=True)
    model.switch_adapter("a", "b")
    assert model.active_adapters == ["b"]
    assert all_same(weights(model), after("b"))
    model.switch_adapter("c")
    assert all_same(weights(model), after("c"))
    model.switch_adapter("c", "a")
    assert all_same(weights(model), after("a"))
    model.unmerge_adapter()
    assert all_same(weights(model), before)


def test_plain_switch_of_one_of_two():
    model, other = tiny(F32), tiny(F32)
    model.merge_adapter(["a", "b"])
    model.switch_adapter("a", "c")
    assert model.active_adapters == ["c"]
    other.merge_adapter(["b", "c"])
    for name, value in weights(model).items():
        torch.testing.assert_close(value, weights(other)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.switch_adapter("b", "c"), r"\['b'\] not merged"),
        (lambda m: m.switch_adapter("x", "c"), "no adapter"),
        (lambda m: m.switch_adapter("a", "a"), "merged already"),
        (lambda m: m.unmerge_adapter(["b"]), r"\['b'\] not merged"),
        (lambda m: m.unmerge_adapter(["x"]), "no adapter"),
        (lambda m: m.merge_adapter(["b"]), "merged with exact=True"),
        (lambda m: m.delete_adapter("a"), "while they are merged"),
    ],
)
def test_refused_by_name(call, message):
    model = tiny()
    model.merge_adapter(exact=True)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all_same(weights(model), before)
    model.unmerge_adapter()


def test_an_error_in_the_last_layer_names_it_and_unwinds():
    model = tiny()
    before = weights(model)
    with torch.no_grad():
        model.base_model.lora_layers()[-1].lora_B["c"].weight[0, 0] = float("nan")
    for options in ({"exact": True}, {"safe_merge": True}, {"exact": True, "safe_merge": True}):
        with pytest.raises(ValueError, match="'head'"):
            model.merge_adapter(["a", "b", "c"], **options)
        assert all_same(weights(model), before)
        assert not any(layer.merged for layer in model.base_model.lora_layers())


ACTIONS = {
    "merge": lambda m, exact: m.merge_adapter(["c"], exact=exact),
    "unmerge": lambda m, exact: m.unmerge_adapter(),
    "unmerge one": lambda m, exact: m.unmerge_adapter(["a"]),
    "switch": lambda m, exact: m.switch_adapter("a", "c"),
}


def interrupted_at(line, model, action, exact):
    """Ctrl-C before the ``line``-th line of our own code runs; whether there was such a line, and it raised."""
    seen = [0]

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            seen[0] += 1
            if seen[0] == line:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        ACTIONS[action](model, exact)
    except KeyboardInterrupt:
        return True, True
    finally:
        sys.settrace(before)
    return seen[0] >= line, False


def state(model):
    layers = model.base_model.lora_layers()
    return [(x.merged_adapters, list(x.residuals), x.active_adapters) for x in layers], model.active_adapters


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("exact", [True, False])
def test_interrupted_at_every_line(action, exact):
    model = tiny(F32)
    model.merge_adapter(["a", "b"], exact=exact)
    start, done = copy.deepcopy(model), copy.deepcopy(model)
    ACTIONS[action](done, exact)
    ends = [(state(m), weights(m)) for m in (start, done)]
    line, raised = 1, 0
    while True:
        # Each line in turn near the start, then in strides: the same lines come again in each layer.
        hit, interrupted = interrupted_at(line, model, action, exact)
        if not hit:
            break
        raised += interrupted
        found, values = state(model), weights(model)
        wanted = [w for s, w in ends if s == found]
        assert wanted, f"line {line}: a state that is neither before nor after"
        for name, value in values.items():
            if exact:
                assert same_bits(value, wanted[0][name]), line
            else:
                torch.testing.assert_close(value, wanted[0][name], rtol=1e-3, atol=1e-5)
        if interrupted and found == ends[0][0] and exact:
            assert all(map(torch.equal, _bodies(model), _bodies(start)))
        if found != ends[0][0] or not exact:
            model = copy.deepcopy(start)
        line += 1 if line < 250 else 7
    assert raised > 20
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _bodies(model):
    return [r.body for layer in model.base_model.lora_layers() for r in layer.residuals.values()]


def test_signals_wait_nests_and_leaves_other_threads_alone():
    reached = []

    def twice():
        with signals_wait():
            with signals_wait():
                signal.raise_signal(signal.SIGINT)
            reached.append(1)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert reached
    results = []
    thread = threading.Thread(target=lambda: all_or_none([], None, lambda: results.append(1)))
    thread.start()
    thread.join()
    assert results == [1]


def test_a_layer_that_can_not_be_restored_is_told_and_the_others_are():
    class Layer:
        def __init__(self, broken):
            self.value, self.broken = 0, broken

        def merge_state(self):
            return self.value

        def restore_merged(self, value):
            if self.broken:
                raise MemoryError("full")
            self.value = value

    def action(layer):
        layer.value += 1
        if layer is layers[-1]:
            raise KeyError

    layers = [Layer(False), Layer(True), Layer(False)]
    with pytest.raises(RuntimeError, match="could not be restored: full"):
        all_or_none(layers, action)
    assert [layer.value for layer in layers] == [0, 1, 0]


def test_a_hundred_random_operations_over_an_encoder():
    """MiniLM in bf16, all its linear layers and embeddings: the published bits at the end."""
    pytest.importorskip(PACKAGE)
    pytest.importorskip("transformers")
    from lora_kernels.bench.exact_walk import adapters_on, random_walk
    from lora_kernels.demo.model import load

    model = adapters_on(load(dtype=BF16).encoder)
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Already following adapters were merged")
        counts = random_walk(model, 100, seed=5)
    assert min(counts.values()) > 10
    assert all_same(weights(model), before)
