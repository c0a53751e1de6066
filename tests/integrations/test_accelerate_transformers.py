"""``accelerate`` in the hands of transformers: Trainer, generate, aLoRA and Arrow models."""

import copy

import pytest
import torch

import lora_kernels as lk

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def llama(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30
    )
    return transformers.LlamaForCausalLM(config)


def filled(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def ids(rows=3, length=7):
    return torch.randint(3, 30, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_the_same_model(tmp_path, checkpointing):
    pytest.importorskip("accelerate")
    data = [{"input_ids": row, "labels": row} for row in ids(8)]
    trained = []
    for turn in (False, True):
        config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = filled(peft.get_peft_model(llama(), config))
        if turn:
            assert len(lk.accelerate(model).replaced) == 4
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(turn)),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            gradient_checkpointing=checkpointing,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        trainer.save_model(str(tmp_path / str(turn)))
        trained.append(peft.get_peft_model_state_dict(model))
    before = peft.get_peft_model_state_dict(filled(peft.get_peft_model(llama(), config)))
    assert trained[0].keys() == trained[1].keys()
    for key, value in trained[0].items():
        step = (value - before[key]).norm()
        assert step > 0
        assert (trained[1][key] - value).norm() <= 1e-3 * step, key
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "True")
    assert torch.equal(peft.get_peft_model_state_dict(again)[key], trained[1][key])


def test_generate_with_one_adapter_a_row_and_beams():
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"), "a")
    theirs.add_adapter("b", peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    theirs = filled(theirs).eval()
    ours = copy.deepcopy(theirs)
    lk.accelerate(ours)
    for options in ({}, {"num_beams": 2}):
        options.update(max_new_tokens=5, do_sample=False, adapter_names=["a", "__base__", "b"], pad_token_id=0)
        assert torch.equal(ours.generate(input_ids=ids(), **options), theirs.generate(input_ids=ids(), **options))


def test_alora_runs_on_the_rows_after_its_invocation(monkeypatch):
    config = {"r": 3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(alora_invocation_tokens=[1, 2], **config), "a")
    theirs.add_adapter("plain", peft.LoraConfig(**config))
    theirs = filled(theirs).eval()
    ours = copy.deepcopy(theirs)
    report = lk.accelerate(ours)
    assert not any(group.reason for group in report.groups)
    from lora_kernels.integrations import peft_layers

    ran = []
    original = peft_layers.Linear._forward_activated

    def spy(layer, x, offsets):
        y = original(layer, x, offsets)
        ran.append(y is not None)
        return y

    monkeypatch.setattr(peft_layers.Linear, "_forward_activated", spy)
    tokens = ids()
    tokens[0, 2:4] = tokens[2, 4:6] = torch.tensor([1, 2])
    with torch.no_grad():
        for active in ("a", "plain"):
            theirs.set_adapter(active)
            ours.set_adapter(active)
            torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)
        assert ran, "aLoRA's layers were not told the offsets"
        assert all(ran), "aLoRA's layers ran PEFT's own forward"
        theirs.set_adapter("a")
        ours.set_adapter("a")
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        got, expected = (m.generate(input_ids=tokens, **options) for m in (ours, theirs))
        assert torch.equal(got, expected)
        names = ["a", "plain", "__base__"]
        got, expected = (m(tokens, adapter_names=names).logits for m in (ours, theirs))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    losses = []
    for model in (ours, theirs):  # with gradients PEFT's own forward runs
        model.set_adapter("a")
        model(tokens).logits.square().mean().backward()
        losses.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0].keys() == losses[1].keys()
    for name, gradient in losses[0].items():
        torch.testing.assert_close(gradient, losses[1][name], rtol=1e-4, atol=1e-6)


def test_arrow_models_keep_working(tmp_path):
    base = llama()
    for name in ("t0", "t1"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        expert = filled(peft.get_peft_model(copy.deepcopy(base), config), seed=ord(name[1]))
        expert.save_pretrained(tmp_path / name)
    arrow = peft.ArrowConfig(top_k=1)
    paths = [str(tmp_path / name) for name in ("t0", "t1")]
    theirs = peft.create_arrow_model(base_model=base, task_specific_adapter_paths=paths, arrow_config=arrow).eval()
    ours = copy.deepcopy(theirs)
    lk.accelerate(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-5)
