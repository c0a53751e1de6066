"""AdapterPool where calls meet: modes, threads, errors, other pools, hooks, moves and casts of the model."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.runtime.layer import PooledLinear

SIZE = 16


def factors(seed, path="0", out=SIZE, rank=4):
    g = torch.Generator().manual_seed(seed)
    shapes = {"lora_A": (rank, SIZE), "lora_B": (out, rank)}
    return {f"{path}.{factor}.weight": torch.randn(shape, generator=g) for factor, shape in shapes.items()}


def config(path="0", **options):
    return lk.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": [path], **options})


def served(num_slots=2, model=None, names=("a",), path="0", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE)) if model is None else model
    pool = lk.AdapterPool(model, num_slots, 8, **options)
    for seed, name in enumerate(names):
        pool.register(name, factors(seed, path), config=config(path))
    return pool


def expected(pool, x, seed, linear=None):
    a, b = factors(seed).values()
    linear = linear or pool.model[0]
    return nn.functional.linear(x, linear.weight, linear.bias) + 2.0 * (x @ a.t()) @ b.t()


def test_a_batch_may_follow_one_in_inference_mode():
    pool, x = served(), torch.randn(2, SIZE)
    with torch.inference_mode(), pool.batch(["a", "a"]):
        pool.model(x)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode(), pool.batch([None, "a"]):
            y = pool.model(x)
        torch.testing.assert_close(y[1], expected(pool, x, 0)[1], rtol=1e-4, atol=1e-4)
    with pool.batch(["a", "a"]):  # plans are shared by the modes of a batch
        with torch.inference_mode():
            pool.model(x)
        pool.model(x.requires_grad_()).sum().backward()


def test_registered_in_inference_mode_or_with_gradients():
    pool = served(names=())
    with torch.inference_mode():
        pool.register("a", factors(0), config=config())
    pool.evict("a")
    pool.register("b", {k: nn.Parameter(v) for k, v in factors(1).items()}, config=config())
    assert pool.model[0].a_bank.grad_fn is None
    copy.deepcopy(pool.model)


def test_an_error_at_the_start_of_a_batch_leaves_the_base(monkeypatch):
    pool, x = served(), torch.randn(2, SIZE)

    def fail(slots):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pool._router, "start", fail, raising=True)
        with pytest.raises(MemoryError), pool.batch(["a", "a"]):
            pass
    assert torch.equal(pool.model(x), pool.model[0].base_layer(x))
    with torch.no_grad(), pool.batch(["a", None]):
        torch.testing.assert_close(pool.model(x)[0], expected(pool, x, 0)[0], rtol=1e-4, atol=1e-4)
    pool.evict("a")


def test_an_error_half_way_through_registering_leaves_the_model(monkeypatch):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(SIZE, 2, SIZE, batch_first=True).eval()
    pool, before, fill, calls = lk.AdapterPool(model, 2, 8), model.activation_relu_or_gelu, PooledLinear.fill, []

    def failing(layer, *args):
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        fill(layer, *args)

    both = factors(0, "linear1") | factors(0, "linear2")
    with monkeypatch.context() as patch:
        patch.setattr(PooledLinear, "fill", failing)
        with pytest.raises(KeyboardInterrupt):
            pool.register("a", both, config=config("linear1"))
    assert len(calls) == 2
    assert type(model.linear1) is type(model.linear2) is nn.Linear
    assert model.activation_relu_or_gelu == before
    pool.register("a", both, config=config("linear1"))
    assert model.activation_relu_or_gelu == 0


def test_slots_are_where_the_layers_are():
    pool, cpu = served(), torch.device("cpu")
    assert pool._router.devices == [cpu]
    pool.model[0]._router.serve(torch.device("meta"))
    assert pool._router.devices == [cpu]
    pool._router.devices.insert(0, other := torch.device("cpu", 0))  # as of a model that was moved
    with torch.no_grad(), pool.batch(["a"]):
        pool.model(torch.randn(1, SIZE))
        assert {device for _, device in pool._router._slots} == {cpu, other}


class WithPositions(nn.Module):
    """Projects its input and, as DeBERTa does, positions that all samples share."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(SIZE, SIZE)
        self.positions = nn.Parameter(torch.randn(1, 6, SIZE))

    def forward(self, x):
        return self.proj(x) + self.proj(self.positions)


def test_inputs_without_the_batch_are_refused():
    pool = served(model=WithPositions(), path="proj")
    with pytest.raises(ValueError, match=r"as its first dimension, got shape \(1, 6, 16\)"), pool.batch([None, "a"]):
        pool.model(torch.randn(2, 6, SIZE))
    x = torch.randn(1, 3, SIZE)  # packed: a name a token
    with torch.no_grad(), pool.batch(["a", None, "a"]):
        y = pool.model.proj(x)
    linear = pool.model.proj.base_layer
    torch.testing.assert_close(y[0, 1], linear(x)[0, 1])
    torch.testing.assert_close(y[0, 2], expected(pool, x, 0, linear)[0, 2], rtol=1e-4, atol=1e-4)


def test_threads_register_into_slots_of_their_own():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(10):
            pool = served(8, names=())
            with ThreadPoolExecutor(6) as threads:
                list(threads.map(lambda i, p=pool: p.register(str(i), factors(i), config=config()), range(6)))
            assert sorted(pool._slot_of.values()) == list(range(6))
    finally:
        sys.setswitchinterval(interval)


def test_what_a_batch_names_stays(tmp_path):
    pool, x = served(1), torch.randn(1, SIZE)
    with torch.no_grad(), pool.batch(["a"]):
        before = pool.model(x)
        with ThreadPoolExecutor(1) as other:
            for call in (lambda: pool.evict("a"), pool.remove):
                with pytest.raises(RuntimeError, match="a batch"):
                    other.submit(call).result()
        assert torch.equal(pool.model(x), before)
    pool.evict("a")
    pool.register("b", factors(1), config=config())
    for again in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        with torch.no_grad(), again.batch(["b"]):
            torch.testing.assert_close(again.model(x), expected(again, x, 1), rtol=1e-4, atol=1e-4)
        again.evict("b")
    assert pool.names == ["b"]


@pytest.mark.parametrize("init", ["pissa", "olora", "PiSSA"])
def test_adapters_relative_to_other_base_weights_are_refused(init, tmp_path):
    pool = served(names=())
    model = lk.get_peft_model(copy.deepcopy(pool.model), config(init_lora_weights=init))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' changes the base weights"):
        pool.register("a", tmp_path)


def test_torchs_fused_encoder_path_is_off_while_it_is_served():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(SIZE, 2, SIZE, batch_first=True).eval()
    before, x = model.activation_relu_or_gelu, torch.randn(2, 3, SIZE)
    pool = served(model=model, path="linear1")
    with pool.batch(["a", "a"]):
        y = model(x)
        with torch.inference_mode():
            torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert (y - model(x)).abs().max() > 0.01
    pool.remove()
    assert model.activation_relu_or_gelu == before


def test_the_projection_inside_of_an_attention_is_refused():
    pool = served(model=nn.Sequential(nn.MultiheadAttention(SIZE, 2)), names=())
    with pytest.raises(ValueError, match="without being called"):
        pool.register("a", factors(0, "0.out_proj"), config=config("out_proj"))


def test_hooks_of_the_base_run_and_what_they_keep_is_left_alone():
    pool, x = served(), torch.randn(2, SIZE)
    base, kept = pool.model[0].base_layer, []
    base.register_forward_hook(lambda module, args, output: kept.append(output))
    base.register_forward_hook(lambda module, args, output: output + 1)
    with torch.no_grad(), pool.batch([None, "a"]):
        y = pool.model(x)
    torch.testing.assert_close(y[0], base.forward(x)[0] + 1)
    torch.testing.assert_close(y[1], expected(pool, x, 0)[1] + 1, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept[0], base.forward(x))


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("names", [["a", None, "b"], [None] * 3])
def test_other_layers_are_differentiable(names):
    pool = served(model=nn.Sequential(Odd(SIZE, SIZE)), names=("a", "b"))
    x = torch.randn(3, SIZE, requires_grad=True)
    with pool.batch(names):
        y = pool.model(x)
    y.square().sum().backward()
    x2 = x.detach().clone().requires_grad_()
    rows = [x2 @ pool.model[0].weight.t() + pool.model[0].bias, expected(pool, x2, 0), expected(pool, x2, 1)]
    wanted = torch.stack([rows[{None: 0, "a": 1, "b": 2}[name]][i] for i, name in enumerate(names)])
    wanted.square().sum().backward()
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-3, atol=1e-3)


def test_a_model_has_one_pool():
    pool = served()
    with pytest.raises(ValueError, match="another pool serves '0'"):
        served(model=pool.model)
    pool.model[0] = nn.Linear(SIZE, SIZE)  # the user's own, since then
    own = pool.model[0]
    pool.remove()
    assert pool.model[0] is own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_model_is_cast_after_it_is_served(dtype):
    pool = served()
    pool.model.to(dtype)
    assert pool.model[0].slot_scalings.dtype is torch.float32
    x = torch.randn(2, SIZE, dtype=dtype)
    with torch.no_grad(), pool.batch(["a", None]):
        y = pool.model(x)
    wanted = expected(served(), x.float(), 0)
    torch.testing.assert_close(y[0].float(), wanted[0], rtol=2e-2, atol=5e-2)


def test_banks_have_the_width_of_their_layer():
    pool = served(model=nn.Sequential(nn.Linear(SIZE, SIZE)).double())
    x = torch.randn(2, SIZE, dtype=torch.float64)
    with torch.no_grad(), pool.batch(["a", "a"]):
        a, b = (f.double() for f in factors(0).values())
        base = pool.model[0].base_layer(x)
        torch.testing.assert_close(pool.model(x), base + 2.0 * (x @ a.t()) @ b.t(), rtol=1e-12, atol=1e-12)


def test_a_pool_is_made_before_the_model_has_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(SIZE, SIZE))
    pool = lk.AdapterPool(model, 2, 8)
    model.to_empty(device="cpu")
    nn.init.normal_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    pool.register("a", factors(0), config=config())
    x = torch.randn(2, SIZE)
    with torch.no_grad(), pool.batch(["a", "a"]):
        torch.testing.assert_close(pool.model(x), expected(pool, x, 0), rtol=1e-4, atol=1e-4)
    assert isinstance(model[0], PooledLinear)


def test_bad_input():
    pool = served()
    linear, half = nn.Linear(SIZE, SIZE), nn.Sequential(nn.Linear(SIZE, SIZE)).bfloat16()
    huge = {k: v * 1e6 for k, v in factors(1).items()}
    for call, error, message in (
        (lambda: lk.AdapterPool(linear), ValueError, "got such a layer itself"),
        (lambda: lk.AdapterPool(half, dtype=torch.int8), ValueError, "dtype: expected None or one of"),
        (lambda: lk.AdapterPool(half, dtype="float16"), ValueError, "dtype: expected None or one of"),
        (lambda: served(model=half, dtype=torch.float16), ValueError, "its banks can be that or float32"),
        (lambda: served(model=copy.deepcopy(half).half(), names=()).register("a", huge, config=config()),
         ValueError, "finite floating numbers in torch.float16"),
        (lambda: pool.register("z", factors(1), config=config(r=8)), ValueError, "r and rank_pattern say 8"),
        (lambda: pool.evict(None), TypeError, "expected the name of an adapter"),
        (lambda: pool.batch(3).__enter__(), TypeError, "names: expected one adapter"),
        (lambda: pool.batch({"a": 1}).__enter__(), TypeError, "names: expected one adapter"),
        (lambda: pool.batch([["a"]]).__enter__(), TypeError, "expected the name of an adapter"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert pool.names == ["a"]


def test_a_sequence_before_the_batch_is_refused_also_where_its_length_is_a_multiple_of_it():
    pool, x = served(), torch.randn(6, 2, SIZE)
    with pytest.raises(ValueError, match=r"\(6, 2, 16\) can be a sequence first"), pool.batch(["a", None]):
        pool.model(x)
    with torch.no_grad(), pool.batch(["a", None]):
        y = pool.model(x[:, :1])  # three beams a row, one token each
    torch.testing.assert_close(y[2], expected(pool, x, 0)[2, :1], rtol=1e-4, atol=1e-4)
    with torch.no_grad(), pool.batch(["a"] * 3 + [None] * 3):
        y = pool.model(x)
    torch.testing.assert_close(y[2], expected(pool, x, 0)[2], rtol=1e-4, atol=1e-4)
    with torch.no_grad(), pool.batch(["a"]):  # six beams of the only row: whichever is first
        y = pool.model(x[:, :1])
    torch.testing.assert_close(y, expected(pool, x[:, :1], 0), rtol=1e-4, atol=1e-4)


def test_experts_are_refused_as_their_rows_are_no_longer_those_of_the_batch():
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(SIZE, SIZE)]), "shared_experts": nn.Linear(SIZE, SIZE)})
    pool = served(model=model, names=())
    with pytest.raises(ValueError, match=r"'experts.0' is an expert"):
        pool.register("a", factors(0, "experts.0"), config=config("0"))
    pool.register("a", factors(0, "shared_experts"), config=config("shared_experts"))


def test_weights_of_the_base_in_a_checkpoint_may_be_those_of_the_model():
    pool = served(names=())
    weight = pool.model[0].weight.detach().clone()  # as PEFT saves it, where a head is adapted
    for key in ("base_model.model.0.base_layer.weight", "0.base_layer.weight"):
        pool.register(key, {**factors(0), key: weight}, config=config())
    pool.evict(key)
    for other in (weight + 1, weight[:-1]):
        with pytest.raises(ValueError, match=r"got \['0.base_layer.weight'\]"):
            pool.register("b", {**factors(0), key: other}, config=config())


def test_factors_in_an_attention_that_never_trained_are_left_out():
    pool = served(model=nn.Sequential(nn.MultiheadAttention(SIZE, 2), nn.Linear(SIZE, SIZE)), names=())
    untrained = factors(1, "0.out_proj")
    untrained["0.out_proj.lora_B.weight"].zero_()
    pool.register("a", {**factors(0, "1"), **untrained}, config=config("1"))
    assert list(pool._layers) == ["1"]
