"""``transformers.Trainer`` with our models: it looks for PEFT's own class, and takes ours for any other module."""

import os

import pytest
import torch

import lora_kernels as lk

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
AdapterTrainer = pytest.importorskip("lora_kernels.integrations.trainer").AdapterTrainer
pytestmark = pytest.mark.filterwarnings("ignore")


def trained(package, folder, steps, resume=False, trainer=transformers.Trainer, **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=20))
    model = package.get_peft_model(base, package.LoraConfig(task_type="CAUSAL_LM", r=2))
    model.add_adapter("idle", package.LoraConfig(task_type="CAUSAL_LM", r=3))
    rows = [{"input_ids": (torch.arange(6) + i) % 20, "labels": (torch.arange(6) + i) % 20} for i in range(8)]
    options = {
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **more,
    }
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, learning_rate=0.1, lr_scheduler_type="constant", **options
    )
    trainer = trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_saves_the_adapter_of_peft_alone_and_all_of_our_model(tmp_path):
    """``save_pretrained`` of the model writes the adapter; our checkpoint is one to go on from (so is PEFT's, but under
    transformers 5.20, the last for Python 3.10)."""
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
        if package is lk:
            torch.testing.assert_close(state, expected)
        losses.append(whole.state.log_history[-1]["train_loss"])
        trainer.model.save_pretrained(folder / "adapter")
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {*os.listdir(folder / "adapter")}
    assert found == [True, False]
    assert abs(losses[0] - losses[1]) < 1e-4


def test_adapter_trainer_saves_the_adapters_alone_and_goes_on_from_them(tmp_path):
    trained(lk, tmp_path, 2, trainer=AdapterTrainer)
    files = {*os.listdir(tmp_path / "checkpoint-2")}
    assert {"adapter_config.json", "adapter_model.safetensors", "idle", "optimizer.pt", "training_args.bin"} <= files
    assert "model.safetensors" not in files
    resumed = trained(lk, tmp_path, 4, resume=True, trainer=AdapterTrainer)
    whole = trained(lk, tmp_path / "whole", 4)
    for name in ("default", "idle"):
        state, expected = (lk.get_peft_model_state_dict(t.model, adapter_name=name) for t in (resumed, whole))
        torch.testing.assert_close(state, expected)
    resumed.model.load_adapter(tmp_path / "checkpoint-4", "again")
    state = lk.get_peft_model_state_dict(resumed.model, adapter_name="again")
    torch.testing.assert_close(state, lk.get_peft_model_state_dict(whole.model))


def test_adapter_trainer_loads_the_best_adapters_at_the_end(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    trainer = trained(lk, tmp_path, 6, trainer=AdapterTrainer, **options)  # the loss falls: the first one is best
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    first = trained(lk, tmp_path / "first", 2)
    state, expected = (lk.get_peft_model_state_dict(t.model) for t in (trainer, first))
    torch.testing.assert_close(state, expected)
    trained_now = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trained_now
    assert all("default" in name for name in trained_now)


def test_adapter_trainer_reads_checkpoints_of_the_whole_model(tmp_path):
    trained(lk, tmp_path, 2)
    assert "model.safetensors" in os.listdir(tmp_path / "checkpoint-2")
    resumed = trained(lk, tmp_path, 4, resume=True, trainer=AdapterTrainer)
    whole = trained(lk, tmp_path / "whole", 4)
    torch.testing.assert_close(*[lk.get_peft_model_state_dict(t.model) for t in (resumed, whole)])


def test_adapter_trainer_is_the_plain_one_for_other_models(tmp_path):
    trained(peft, tmp_path, 2, trainer=AdapterTrainer)
    assert "adapter_model.safetensors" in os.listdir(tmp_path / "checkpoint-2")


BERT = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def short(package, kind, base, rows, folder, task, target, **options):
    """A trainer that has done one step."""
    model = package.get_peft_model(base, package.LoraConfig(task_type=task, r=2, target_modules=[target]))
    settings = {
        "max_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    trainer = kind(
        model, transformers.TrainingArguments(str(folder), **settings), train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
@pytest.mark.parametrize("kind", [transformers.Trainer, AdapterTrainer])
def test_all_columns_that_the_base_model_takes_arrive(tmp_path, task, kind):
    for package in (peft, lk):
        base = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))
        seen = []
        embeddings = base.bert.embeddings
        embeddings.register_forward_pre_hook(
            lambda m, a, k, s=seen: s.append(k.get("token_type_ids")), with_kwargs=True
        )
        types = torch.tensor([0, 0, 0, 1, 1, 1])
        rows = [{"input_ids": torch.arange(6), "token_type_ids": types, "labels": i % 2} for i in range(8)]
        short(package, kind, base, rows, tmp_path, task, "query")
        assert seen[0] is not None, package.__name__


class Classifier(transformers.PreTrainedModel):
    """A model whose forward takes no other keywords; its quantisation is what transformers asks it for."""

    config_class = transformers.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.query = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 8)
        self.classifier = torch.nn.Linear(8, 2)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, output_attentions=None,
        output_hidden_states=None, return_dict=None,
    ):  # fmt: skip
        logits = self.classifier(self.query(self.embed(input_ids).mean(1)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("kind", [transformers.Trainer, AdapterTrainer])
def test_models_of_ones_own_and_quantised_ones_are_trained(tmp_path, quantised, kind):
    rows = [{"input_ids": torch.arange(6), "labels": i % 2} for i in range(8)]
    for package in (peft, lk):
        base = Classifier(transformers.BertConfig())
        if quantised:
            base.is_quantized, base.hf_quantizer = True, type("Quantizer", (), {"is_trainable": True})()
        short(package, kind, base, rows, tmp_path, "SEQ_CLS", "query")


def test_labels_are_found_and_smoothed_as_for_peft_where_the_plain_trainer_sees_another_class(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    rows = [{"input_ids": (torch.arange(6) + i) % 20, "labels": (torch.arange(6) + i) % 20} for i in range(8)]

    def loss(package, kind, task, **options):
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=20))
        return short(package, kind, base, rows, tmp_path, task, "q_proj", **options).evaluate().get("eval_loss")

    for task, options in (("CAUSAL_LM", {"label_smoothing_factor": 0.1}), (None, {})):
        expected = loss(peft, transformers.Trainer, task, **options)
        plain = loss(lk, transformers.Trainer, task, **options)
        assert plain is None or abs(plain - expected) > 0.01
        assert abs(loss(lk, AdapterTrainer, task, **options) - expected) < 1e-3
