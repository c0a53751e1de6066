"""AdapterPool: each row of a batch equals the model with that row's adapter alone."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.runtime.layer import PooledLinear

TARGETS = ["query", "out"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(24, 32)
        self.other = nn.Linear(32, 32)
        self.out = nn.Linear(32, 16)

    def forward(self, x):
        return self.out(torch.relu(self.other(torch.relu(self.query(x)))))


@pytest.fixture
def base():
    torch.manual_seed(1)
    return Net().eval()


def make_adapter(base, path, seed, **config):
    """Saves a trained-looking adapter; returns the model that has it alone."""
    torch.manual_seed(seed)
    config = {"target_modules": TARGETS, "r": 4, "lora_alpha": 8, **config}
    model = lk.get_peft_model(copy.deepcopy(base), lk.LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return model.eval()


@pytest.fixture
def served(base, tmp_path):
    configs = {
        "a": {},
        "b": {"r": 7, "use_rslora": True, "target_modules": ["query"]},
        "c": {"rank_pattern": {"out": 2}, "alpha_pattern": {"out": 3}, "target_modules": ["out", "other"]},
    }
    alone = {None: copy.deepcopy(base)}
    pool = lk.AdapterPool(base, num_slots=4, max_rank=8)
    for seed, (name, config) in enumerate(configs.items()):
        alone[name] = make_adapter(alone[None], tmp_path / name, seed, **config)
        pool.register(name, tmp_path / name)
    return pool, alone


@pytest.mark.parametrize("names", [["a", None, "b", "c", "a"], ["c"] * 5, [None] * 5])
@pytest.mark.parametrize("length", [None, 1, 6])
def test_each_row_runs_its_own_adapter(served, names, length):
    pool, alone = served
    x = torch.randn(5, 24) if length is None else torch.randn(5, length, 24)
    with torch.no_grad(), pool.batch(names):
        y = pool.model(x)
    for row, name in enumerate(names):
        with torch.no_grad():
            torch.testing.assert_close(y[row : row + 1], alone[name](x[row : row + 1]), rtol=1e-4, atol=1e-5)


def test_rows_are_bitwise_alone_when_batch_invariant(served):
    pool, _ = served
    names, x = ["a", None, "b", "c", "a"], torch.randn(5, 6, 24)
    with torch.no_grad(), lk.use_backend("auto", batch_invariant=True):
        with pool.batch(names):
            mixed = pool.model(x)
        for row, name in enumerate(names):
            with pool.batch([name] * 5):
                assert torch.equal(pool.model(x)[row], mixed[row])


def test_outside_a_batch_it_is_the_base(served):
    pool, alone = served
    x = torch.randn(3, 24)
    assert torch.equal(pool.model(x), alone[None](x))


def test_slots_are_reused(served, tmp_path):
    pool, alone = served
    make_adapter(alone[None], tmp_path / "d", 9, r=1)
    pool.evict("a")
    for name in ("d", "e"):
        pool.register(name, tmp_path / "d")
    assert pool.names == ["b", "c", "d", "e"]
    with pytest.raises(ValueError, match="all 4 slots are taken"):
        pool.register("f", tmp_path / "d")
    x = torch.randn(2, 24)
    with torch.no_grad(), pool.batch(["d", "e"]):
        y = pool.model(x)
        reference = lk.PeftModel.from_pretrained(copy.deepcopy(alone[None]), tmp_path / "d").eval()
        torch.testing.assert_close(y, reference(x), rtol=1e-4, atol=1e-5)


def test_only_touched_layers_are_wrapped(base, tmp_path):
    make_adapter(base, tmp_path / "a", 0)
    pool = lk.AdapterPool(base, num_slots=2, max_rank=4)
    pool.register("a", tmp_path / "a")
    assert isinstance(base.query, PooledLinear)
    assert type(base.other) is nn.Linear
    pool.remove()
    assert not any(isinstance(module, PooledLinear) for module in base.modules())


def test_state_dict_source_and_half_precision(base, tmp_path):
    base.to(torch.bfloat16)
    model = make_adapter(base, tmp_path / "a", 0)
    pool = lk.AdapterPool(base, dtype=torch.float32, num_slots=2, max_rank=4)
    pool.register("a", lk.get_peft_model_state_dict(model), config=model.peft_config["default"])
    x = torch.randn(2, 24, dtype=torch.bfloat16)
    with torch.no_grad(), pool.batch(["a", "a"]):
        torch.testing.assert_close(pool.model(x), model(x), rtol=2e-2, atol=2e-2)


class Odd(nn.Linear):
    """A linear layer that computes its product in its own way."""

    def forward(self, x):
        return super().forward(x) * 2


def test_other_linear_layers_keep_their_own_forward(base, tmp_path):
    base.query.__class__ = Odd
    model = make_adapter(base, tmp_path / "a", 0)
    pool = lk.AdapterPool(base, num_slots=2, max_rank=4)
    pool.register("a", tmp_path / "a")
    x = torch.randn(4, 24)
    with torch.no_grad(), pool.batch(["a"] * 4):
        torch.testing.assert_close(pool.model(x), model(x), rtol=1e-4, atol=1e-5)


def test_compiled_model_follows_the_batch(served):
    pool, _ = served
    compiled = torch.compile(pool.model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 2, 24)
    counters = torch._dynamo.utils.counters
    with torch.no_grad():
        for round_, names in enumerate((["a", None, "b"], ["b", "c", "a"], [None, "a", "a"])):
            with pool.batch(names):
                y = compiled(x)
                torch.testing.assert_close(y, pool.model(x))
            if round_ == 0:
                graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs


def test_bad_input(served, tmp_path):
    pool, alone = served
    x = torch.randn(3, 24)
    for call, error, message in (
        (lambda: pool.register("a", tmp_path / "a"), ValueError, "'a' is resident already"),
        (lambda: pool.register("", tmp_path / "a"), TypeError, "name: expected a non-empty str"),
        (lambda: pool.register("z", tmp_path / "nowhere"), ValueError, "adapter_config.json"),
        (lambda: pool.register("z", {}), ValueError, "config: expected the LoraConfig"),
        (lambda: pool.evict("aa"), ValueError, "no adapter 'aa' is resident; closest: a"),
        (lambda: pool.batch("a").__enter__(), TypeError, "names: expected one adapter"),
        (lambda: pool.batch([]).__enter__(), ValueError, "at least one row"),
        (lambda: pool.batch(["a", "x"]).__enter__(), ValueError, "no adapter 'x'"),
        (lambda: lk.AdapterPool(alone[None], num_slots=0), ValueError, "num_slots"),
        (lambda: lk.AdapterPool(3), TypeError, "model"),
    ):
        with pytest.raises(error, match=message):
            call()
    with pool.batch(["a", "b"]):
        with pytest.raises(ValueError, match="x: 3 rows can not be split over the 2 rows"):
            pool.model(x)
        with pytest.raises(RuntimeError, match="do not nest"), pool.batch(["a"]):
            pass
    assert torch.equal(pool.model(x), alone[None](x))


def test_threads_run_batches_of_their_own(served):
    pool, _ = served
    x = torch.randn(6, 24)
    batches = [["a", "b", "c", None, "a", "b"], ["c"] * 6, None, ["b", None] * 3, ["a"] * 6, None]

    def run(names):
        with torch.no_grad():
            if names is None:
                return pool.model(x)
            with pool.batch(names):
                return pool.model(x)

    expected = [run(names) for names in batches]
    with ThreadPoolExecutor(len(batches)) as threads:
        for _ in range(30):
            assert all(map(torch.equal, threads.map(run, batches), expected))


def test_unfit_checkpoints_leave_the_pool_alone(served, tmp_path):
    pool, _ = served
    config = lk.LoraConfig(r=2, target_modules=["query"])
    good = {
        "base_model.model.query.lora_A.weight": torch.randn(2, 24),
        "base_model.model.query.lora_B.weight": torch.randn(32, 2),
    }
    a, b = good
    for tensors, message in (
        ({}, "no lora_A and lora_B"),
        ({a: good[a]}, "expected lora_A and lora_B"),
        ({**good, a: torch.randn(2, 23)}, r"expected lora_A \(rank, 24\)"),
        ({**good, b: torch.full((32, 2), float("nan"))}, "finite"),
        ({**good, a: torch.randn(9, 24), b: torch.randn(32, 9)}, "a slot holds 1 to 8"),
        ({**good, "base_model.model.emb.lora_embedding_A": torch.randn(2, 9)}, "only LoRA on linear layers"),
        ({k.replace("query", "quary"): v for k, v in good.items()}, "no linear layer 'quary'; closest: query"),
    ):
        with pytest.raises(ValueError, match=message):
            pool.register("z", tensors, config=config)
    for config_change, message in (
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["other"]}, "modules_to_save"),
    ):
        changed = lk.LoraConfig(r=2, target_modules=["query"], **config_change)
        with pytest.raises(ValueError, match=message):
            pool.register("z", good, config=changed)
    pool.register("z", good, config=changed, skip_modules_to_save=True)
    assert pool.names == ["a", "b", "c", "z"]
