"""``transformers.Trainer`` with our models: it looks for PEFT's own class, and takes ours for any other module."""

import os

import pytest
import torch

import lora_kernels as lk

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


def trained(package, folder, steps, resume=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=20))
    model = package.get_peft_model(base, package.LoraConfig(task_type="CAUSAL_LM", r=2))
    rows = [{"input_ids": (torch.arange(6) + i) % 20, "labels": (torch.arange(6) + i) % 20} for i in range(8)]
    options = {
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, learning_rate=0.1, lr_scheduler_type="constant", **options
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_saves_the_adapter_of_peft_alone_and_all_of_our_model(tmp_path):
    """``save_pretrained`` of the model writes the adapter; a checkpoint of either kind is one to go on from."""
    found, losses = [], []
    for package in (peft, lk):
        folder = tmp_path / package.__name__
        trained(package, folder, 2)
        trainer = trained(package, folder, 4, resume=True)
        whole = trained(package, tmp_path / f"{package.__name__}-whole", 4)
        trainer.save_model(folder / "saved")
        found.append("adapter_config.json" in os.listdir(folder / "saved"))
        state, expected = (package.get_peft_model_state_dict(t.model) for t in (trainer, whole))
        assert any(value.any() for key, value in state.items() if "lora_B" in key)
        torch.testing.assert_close(state, expected)
        losses.append(whole.state.log_history[-1]["train_loss"])
        trainer.model.save_pretrained(folder / "adapter")
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {*os.listdir(folder / "adapter")}
    assert found == [True, False]
    assert abs(losses[0] - losses[1]) < 1e-4
