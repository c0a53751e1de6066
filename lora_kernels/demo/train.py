"""Fine-tuning one adapter, and what it has to beat: a linear head on the frozen encoder."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from ..model import get_peft_model
from .model import batches, lora_config, tokens
from .progress import bar
from .tasks import MAX_LABELS

BATCH = 32
HEAD_LR = 1e-2
ADAPTER_LR = 1e-3
MAX_NORM = 1.0  # of the gradient: with bfloat16 activations a rare large step undoes the training
LONGER = 20  # the frozen encoder's head is also trained this many times longer


@dataclasses.dataclass
class Result:
    task: str
    num_train: int
    num_held_out: int
    frozen: float  # held-out accuracy, the head trained for as many steps as the adapter
    frozen_longer: float
    adapter: float

    @property
    def margin(self):
        """Over the better of the two frozen results."""
        return self.adapter - max(self.frozen, self.frozen_longer)


def embed(classifier, examples, device):
    found = [None] * len(examples)
    for rows in batches(examples, 2 * BATCH):
        with torch.no_grad():
            embeddings = classifier.encode(**tokens([examples[i].text for i in rows], device))
        for row, embedding in zip(rows, embeddings, strict=True):
            found[row] = embedding
    return torch.stack(found)


def labels(examples, device):
    return torch.tensor([example.label for example in examples], device=device)


def accuracy(logits, wanted):
    return (logits.argmax(1) == wanted).float().mean().item()


def frozen_accuracies(classifier, train, held_out, epochs, seed, device):
    """Held-out accuracies of a linear head on the frozen encoder's embeddings, trained for so many epochs and for
    :data:`LONGER` times as many."""
    sides = [(embed(classifier, examples, device), labels(examples, device)) for examples in (train, held_out)]
    return [_head_accuracy(*sides, _steps(train, epochs * longer, seed), seed, device) for longer in (1, LONGER)]


def _head_accuracy(train, held_out, steps, seed, device):
    x, y = train
    torch.manual_seed(seed)
    head = nn.Linear(x.shape[1], MAX_LABELS).to(device)
    optimizer, schedule = _optimizer([(head.parameters(), HEAD_LR)], len(steps))
    for rows in steps:
        optimizer.zero_grad()
        F.cross_entropy(head(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return accuracy(head(held_out[0]), held_out[1])


def train_adapter(classifier, task, train, epochs, seed, device):
    """The classifier, wrapped, with its trained adapter (named after the task)."""
    torch.manual_seed(seed)
    model = get_peft_model(classifier, lora_config(), adapter_name=task.name).train()
    adapter = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
    head = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    wanted = labels(train, device)
    steps = _steps(train, epochs, seed)
    optimizer, schedule = _optimizer([(adapter, ADAPTER_LR), (head, HEAD_LR)], len(steps))
    for rows in bar(steps, f"train {task.name}"):
        optimizer.zero_grad()
        logits = model(**tokens([train[i].text for i in rows], device))
        F.cross_entropy(logits, wanted[rows]).backward()
        nn.utils.clip_grad_norm_(adapter, MAX_NORM)
        optimizer.step()
        schedule.step()
    return model.eval()


def adapter_accuracy(model, held_out, device):
    embeddings = embed(model.get_base_model(), held_out, device)
    with torch.no_grad():
        return accuracy(model.get_base_model().head(embeddings), labels(held_out, device))


def _steps(train, epochs, seed):
    return [rows for epoch in range(epochs) for rows in batches(train, BATCH, seed=seed + epoch)]


def _optimizer(groups, num_steps):
    optimizer = torch.optim.AdamW([{"params": params, "lr": lr} for params, lr in groups])
    rates = [lr for _, lr in groups]
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=num_steps, pct_start=0.1)
