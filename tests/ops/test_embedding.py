"""``lora_embedding``: against float64, gradients, padding, repeated ids, bad input; and the layer that calls it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_kernels as lk
from lora_kernels.layers.embedding import LoraEmbedding
from lora_kernels.ops import lora_embedding
from lora_kernels.testing import (
    DTYPES,
    assert_within_budget,
    eager_lora_embedding,
    embedding_results,
    make_embedding,
)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 5, 1), (40, 11, 37, 5), (7, 300, 64, 20)], ids=str)
def test_results_and_gradients_are_within_budget(shape, dtypes):
    for padding_idx, base in ((None, True), (2, False), (-1, False)):
        case = make_embedding(*shape, *DTYPES[dtypes], base=base)
        found = embedding_results(lora_embedding, case, padding_idx=padding_idx)
        expected = [
            embedding_results(eager_lora_embedding, case, dtype, padding_idx) for dtype in (None, torch.float64)
        ]
        for index, (ours, theirs, exact) in enumerate(zip(found, *expected, strict=True)):
            assert_within_budget(ours, theirs, exact, f"padding {padding_idx}, result {index}")


def test_shapes_of_ids():
    case = make_embedding(6, 9, 8, 2)
    y = lora_embedding(case.ids, *case.args()[1:])
    for ids in (case.ids.view(2, 3).int(), case.ids.repeat_interleave(2)[::2], case.ids[:0], case.ids[0]):
        result = lora_embedding(ids, *case.args()[1:])
        assert result.shape == (*ids.shape, 8)
        if ids.numel() == 1:  # of one row MKL makes another product, with other last bits
            torch.testing.assert_close(result.reshape(-1, 8), y[:1])
        else:
            assert torch.equal(result.reshape(-1, 8), y[: ids.numel()])


@pytest.mark.parametrize("dtypes", DTYPES)
def test_batch_invariant_rows(dtypes):
    case = make_embedding(40, 11, 37, 33, *DTYPES[dtypes])
    with lk.use_backend(batch_invariant=True):
        for lora_a in (case.lora_a, case.lora_a.clone().requires_grad_()):
            y = lora_embedding(case.ids, case.weight, lora_a, case.lora_b, case.scaling)
            for row in (0, 20, 39):
                assert torch.equal(lora_embedding(case.ids[row], *case.args()[1:]), y[row])
        assert lora_embedding(case.ids[:0], *case.args()[1:]).shape == (0, 37)


def test_compiles_as_one_graph():
    case = make_embedding(6, 9, 8, 2)
    leaves = [case.lora_a.requires_grad_(), case.lora_b.requires_grad_()]
    step = lambda: lora_embedding(*case.args()).square().sum()  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(
        torch.autograd.grad(compiled(), leaves), torch.autograd.grad(step(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ids", torch.zeros(3), "ids: expected torch.int32 or torch.int64, got torch.float32"),
        ("lora_a", torch.zeros(2, 8), "lora_a: expected"),
        ("lora_b", torch.zeros(8, 3), "lora_b: expected shape"),
        ("lora_b", torch.zeros(8, 2).double(), "lora_b: expected"),
        ("weight", torch.zeros(9, 8, requires_grad=True), "weight: gradients are not computed"),
    ],
)
def test_bad_arguments_are_named(name, value, message):
    case = make_embedding(3, 9, 8, 2)
    setattr(case, name, value)
    with pytest.raises((TypeError, ValueError), match=message):
        lora_embedding(*case.args())


def test_padding_and_ids_out_of_range():
    case = make_embedding(3, 9, 8, 2)
    with pytest.raises(ValueError, match="padding_idx: expected an entry of 9 embeddings, got 9"):
        lora_embedding(*case.args(), padding_idx=9)
    with pytest.raises(TypeError, match="padding_idx: expected an int or None, got '2'"):
        lora_embedding(*case.args(), padding_idx="2")
    case.ids[1] = 9
    with pytest.raises(IndexError):
        lora_embedding(*case.args())


def _layer(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6, **options))
    model = lk.get_peft_model(model, lk.LoraConfig(r=3, target_modules=["0"]))
    layer = model.base_model.model[0]
    assert isinstance(layer, LoraEmbedding)
    nn.init.normal_(layer.lora_embedding_A["default"])
    return layer


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}, {"max_norm": 0.5}], ids=str)
def test_the_layer(options):
    layer, ids = _layer(**options), torch.tensor([[2, 3, 3], [10, 0, 2]])
    assert (layer._plain(ids) is None) == bool(options and "padding_idx" not in options)
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    expected = (
        layer.base_layer(ids)
        + F.linear(
            F.embedding(
                ids, a.t(), options.get("padding_idx"), scale_grad_by_freq=bool(options.get("scale_grad_by_freq"))
            ),
            b,
        )
        * layer.scaling["default"]
    )
    y = layer(ids)
    torch.testing.assert_close(y, expected)
    weights = torch.randn(y.shape)
    grads = [torch.autograd.grad((result * weights).sum(), (a, b)) for result in (y, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_the_op_can_not_do_goes_another_way():
    layer, ids = _layer(), torch.tensor([1, 2])
    plain = layer._plain(ids)
    assert plain is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer._plain(ids) is None
    handle = layer.base_layer.register_forward_hook(lambda *_: None)
    assert layer._plain(ids) is None
    handle.remove()
    layer.base_layer.weight.requires_grad_()
    assert layer._plain(ids) is None
    layer(ids).sum().backward()
    assert layer.base_layer.weight.grad is not None
