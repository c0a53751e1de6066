"""What is done with a wrapped model: training, compiling, checkpoints of activations, attributes that reach through."""

import copy

import pytest
import torch
from torch import nn

from lora_kernels.config import LoraConfig
from lora_kernels.model import get_peft_model

from .models import randomize, tiny, token_ids, weights, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_lowers_the_loss_and_leaves_the_base(dtype, dropout):
    config = LoraConfig(r=8, lora_dropout=dropout, target_modules=["embed", "q_proj", "v_proj"])
    model = get_peft_model(tiny(dtype=dtype), config).train()
    ids, labels = token_ids(), torch.randint(0, 5, (3, 4))
    before = weights(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(ids).float().flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())


@pytest.mark.parametrize("train", [False, True])
def test_a_wrapped_model_compiles_whole(train):
    model = wrapped(targets=("embed", "q_proj", "v_proj"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(train):
        y = compiled(token_ids())
    torch.testing.assert_close(y, model(token_ids()))
    if train:
        y.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        model(token_ids()).square().sum().backward()
        for grad, parameter in zip(grads, (p for p in model.parameters() if p.requires_grad), strict=True):
            torch.testing.assert_close(grad, parameter.grad)


def test_a_compiled_model_follows_every_change():
    model = wrapped()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    steps = [
        lambda: None,
        lambda: model.set_adapter("b"),
        lambda: model.set_adapter(["b", "default", "b"]),
        model.merge_adapter,
        model.disable_adapter_layers,
        model.unmerge_adapter,
        model.enable_adapter_layers,
        lambda: model.delete_adapter("b"),
        lambda: randomize(model, 9),
    ]
    with torch.no_grad():
        for step in steps:
            step()
            torch.testing.assert_close(compiled(token_ids()), model(token_ids()))


@pytest.mark.parametrize("mask", [False, True])
def test_torchs_fused_encoder_does_not_pass_the_adapters_by(mask):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    base = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2)})
    x = torch.randn(2, 3, 16)
    padding = torch.tensor([[False] * 3, [False, False, True]]) if mask else None
    kept = slice(None), slice(0, 2 if mask else 3)
    model = randomize(get_peft_model(base, LoraConfig(r=4, target_modules=["linear1", "linear2"])))
    trained = model.train().encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        got = model.eval().encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got[kept], trained[kept])
    plain = copy.deepcopy(model).merge_and_unload().eval()
    with torch.no_grad():
        torch.testing.assert_close(plain.encoder(x, src_key_padding_mask=padding)[kept], got[kept])
    assert plain.encoder.layers[0].activation_relu_or_gelu == 1
    assert plain.encoder.use_nested_tensor


def test_gradient_checkpointing():
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    base = transformers.BertModel(transformers.BertConfig(**size, vocab_size=50))
    ids = torch.ones(2, 3, dtype=torch.long)
    grads = []
    for reentrant in (None, False, True):
        model = copy.deepcopy(base)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = randomize(get_peft_model(model, LoraConfig(r=2, lora_dropout=0.3))).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout) and module.p == 0.1:
                module.p = 0.0
        torch.manual_seed(0)
        model(input_ids=ids).last_hidden_state.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in grads[1:]:
        for one, two in zip(grads[0], other, strict=True):
            torch.testing.assert_close(one, two)


def test_attributes_reach_through():
    model = wrapped()
    assert model.head is model.base_model.model.head
    assert model.get_base_model() is model.base_model.model
    assert model.active_adapter == "default"
    assert model.active_peft_config is model.peft_config["default"]
    assert model.modules_to_save is None
    with pytest.raises(AttributeError):
        _ = model.no_such_thing
    trained, total = model.get_nb_trainable_parameters()
    assert 0 < trained < total


def test_print_trainable_parameters(capsys):
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 128 || all params: 1,509 || trainable%: 8.4824\n"
