"""Mixed batches: each row's own adapter, against PEFT and against each adapter alone."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels import ops

from .models import randomize, tiny, token_ids

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["b", "__base__", "default"]


def model(package=lk, **values):
    made = package.get_peft_model(tiny(), package.LoraConfig(r=4, target_modules=["q_proj", "embed"], **values))
    made.add_adapter("b", package.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"], **values))
    return randomize(made).eval()


@pytest.mark.parametrize("saved", [None, ["head"]])
def test_rows_equal_those_of_peft(saved):
    ours, theirs = model(modules_to_save=saved), model(peft, modules_to_save=saved)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(
        ours(token_ids(), adapter_names=NAMES), theirs(token_ids(), adapter_names=NAMES), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_equals_its_adapter_alone(dtype):
    mixed = model().to(dtype)
    got = mixed(token_ids(), adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with mixed.disable_adapter():
                alone = mixed(token_ids())
        else:
            mixed.set_adapter(name)
            alone = mixed(token_ids())
        torch.testing.assert_close(got[row], alone[row])


def test_gradients_reach_the_adapters_of_their_rows():
    mixed = model()
    mixed.set_requires_grad(["default", "b"])
    mixed(token_ids(), adapter_names=["b", "b", "__base__"]).sum().backward()
    layer = mixed.get_base_model().layers[0].v_proj
    assert layer.lora_A["b"].weight.grad.abs().sum() > 0
    embedding = mixed.get_base_model().embed.lora_embedding_A["default"]
    assert embedding.grad is None or embedding.grad.abs().sum() == 0


def test_one_plan_serves_all_layers(monkeypatch):
    calls = []
    plan = ops.plan_batch
    monkeypatch.setattr(ops, "plan_batch", lambda *a, **k: calls.append(1) or plan(*a, **k))
    made = lk.get_peft_model(tiny(), lk.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    made(token_ids(), adapter_names=["default", "__base__", "default"])
    assert len(calls) == 1
    assert not any(m._forward_pre_hooks for m in made.modules())


ERRORS = {
    "training": (lambda m: m.train()(token_ids(), adapter_names=NAMES), "training mode"),
    "unknown": (lambda m: m(token_ids(), adapter_names=["x", "b", "b"]), r"non-existing adapter\(s\): x"),
    "length": (lambda m: m(token_ids(), adapter_names=["b"]), "but got 1 and 3 respectively"),
    "merged": (lambda m: (m.merge_adapter(), m(token_ids(), adapter_names=NAMES)), "call `unmerge_adapter` first"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("package", [peft, lk])
def test_refused_as_in_peft(case, package):
    call, message = ERRORS[case]
    made = model(package)
    with pytest.raises(ValueError, match=message):
        call(made)
    if package is lk:
        assert made.base_model._rows.batch is None


def test_disabled_adapters_win_over_names():
    made, base = model(), tiny()
    with made.disable_adapter():
        torch.testing.assert_close(made(token_ids(), adapter_names=["b"] * 3), base(token_ids()))


def test_a_module_saved_in_full_that_is_no_plain_layer_is_refused():
    made = lk.get_peft_model(tiny(), lk.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])).eval()
    with pytest.raises(TypeError, match="Mixed batching is only supported"):
        made(token_ids(), adapter_names=["default"] * 3)


def test_a_base_layer_with_hooks_and_a_subclass_are_run_by_groups():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain = nn.Sequential(Doubled(8, 8), nn.Linear(8, 8))
    plain[1].register_forward_hook(lambda module, args, y: y + 1)
    made = lk.get_peft_model(copy.deepcopy(plain), lk.LoraConfig(target_modules=["0", "1"]))
    made.add_adapter("b", lk.LoraConfig(target_modules=["0", "1"]))
    randomize(made).eval()
    x = torch.randn(3, 8)
    got = made(x, adapter_names=NAMES)
    made.set_adapter("b")
    torch.testing.assert_close(got[0], made(x)[0])
    torch.testing.assert_close(got[1], plain(x)[1])


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_generate(kind, beams):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "decoder":
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=32)
        base, targets = transformers.GPT2LMHeadModel(config), ["lm_head"]
    else:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        config = transformers.T5Config(vocab_size=20, decoder_start_token_id=0, **sizes)
        base, targets = transformers.T5ForConditionalGeneration(config), ["q", "v", "wo"]
    config.pad_token_id = 0
    base.generation_config.pad_token_id = 0
    found = []
    for package in (peft, lk):
        made = package.get_peft_model(copy.deepcopy(base), package.LoraConfig(target_modules=targets))
        made.add_adapter("b", package.LoraConfig(target_modules=targets))
        randomize(made).eval()
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        mixed = made.generate(input_ids=token_ids(), adapter_names=NAMES, **options)
        found.append(torch.stack(mixed.logits))
        plain = torch.stack(made.generate(input_ids=token_ids(), **options).logits)
        assert not torch.allclose(plain, found[-1])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


class _Kinds(nn.Module):
    """Layers that take a mixed batch in one call, and layers that take each adapter's samples by themselves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Embedding(11, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.q_proj, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, ids):
        return self.head(self.q_proj(self.conv(self.embed(ids).mT).mT))


def test_threads_have_batches_of_their_own():
    """Forwards of several threads at once, mixed and not: each as if alone, and nothing is left behind."""
    kinds = lk.get_peft_model(_Kinds(), lk.LoraConfig(r=4, target_modules=["embed", "conv", "q_proj"]))
    kinds.add_adapter("b", lk.LoraConfig(r=2, target_modules=["conv", "q_proj", "head"]))
    randomize(kinds).eval()
    batches = [NAMES, None, ["b"] * 3, ["__base__", "default", "b"], None, ["default", "b", "b"]]

    def run(names):
        with torch.no_grad():
            return kinds(token_ids(), adapter_names=names)

    expected = [run(names) for names in batches]
    with ThreadPoolExecutor(len(batches)) as pool:
        for _ in range(40):
            assert all(map(torch.equal, pool.map(run, batches), expected))
    assert torch.equal(run(None), expected[1])
