"""The same work by the plain model, by PEFT and by us: outputs compared, times taken in turns."""

import dataclasses
import importlib.util

import torch

from ..bench.timing import interleaved
from ..model import PeftModel
from ..runtime import AdapterPool
from . import jobs
from .jobs import LENGTH, rows_of
from .model import load
from .progress import bar
from .serve import Claim, distance, encode


@dataclasses.dataclass
class Row:
    """Seconds of one kind of work; None where a contender is absent."""

    work: str
    base: float | None
    peft: float | None
    ours: float


class Contenders:
    """Fresh models on the same weights: plain, PEFT's (where installed), ours, and ours behind a pool."""

    def __init__(self, paths, device, dtype):
        self.device, self.names = device, list(paths)
        self.plain = load(device, dtype)
        self.ours = load_adapters(PeftModel, paths, device, dtype)
        self.pool = load_pool(paths, device, dtype)
        self.peft = None
        if importlib.util.find_spec("peft") is not None:
            import peft

            self.peft = load_adapters(peft.PeftModel, paths, device, dtype)

    def choose(self, name, trainable=False):
        """Makes one adapter active; frozen unless it is to be trained."""
        for model in (self.ours, self.peft):
            if model is not None:
                model.set_adapter(name)
                model.zero_grad(set_to_none=True)
                for parameter in model.parameters():
                    parameter.requires_grad_(parameter.requires_grad and trainable)

    def models(self):
        return {"base": self.plain, "ours": self.ours} | ({"peft": self.peft} if self.peft else {})


def load_adapters(kind, paths, device, dtype):
    """A fresh model with the saved adapters, by our PeftModel or by PEFT's; the first is active."""
    (first, path), *others = paths.items()
    model = kind.from_pretrained(load(device, dtype), path, adapter_name=first, torch_device=str(device))
    for name, path in others:
        model.load_adapter(path, name, torch_device=str(device))
    model.set_adapter(first)
    return model.eval()


def load_pool(paths, device, dtype):
    pool = AdapterPool(load(device, dtype), num_slots=len(paths), max_rank=8, dtype=torch.float32)
    for name, path in paths.items():
        pool.register(name, path, skip_modules_to_save=True)
    return pool


def check_outputs(contenders, oracle, texts):
    """Our forward against PEFT's on the same rows, each within its budget of float64."""
    if contenders.peft is None:
        return []
    batch = rows_of(texts, 16, contenders.device)
    worst = 0.0
    for name in contenders.names:
        contenders.choose(name)
        ours, peft = (encode(m.get_base_model(), batch) for m in (contenders.ours, contenders.peft))
        worst = max(worst, distance(ours, peft, 2 * oracle.budget(name, batch)))
    return [Claim("our outputs equal PEFT's on the same adapters", worst <= 1, f"{worst:.2f} of two budgets")]


def measure(contenders, texts, sizes, seconds):
    """Rows of the table: best of many rounds."""
    size = sizes[-1]
    work = [(f"forward, {n} x {LENGTH} tokens", jobs.forward(contenders, texts, n)) for n in sizes]
    work += [
        (f"mixed batch, {size} x {LENGTH} tokens", jobs.mixed(contenders, texts, size)),
        (f"train step, {size} x {LENGTH} tokens", jobs.train_step(contenders, texts, size)),
        ("merge and unmerge", jobs.merge(contenders)),
        ("switch there and back", jobs.switch(contenders)),
    ]
    rows = []
    for name, job in bar(work, "time"):
        with job as runs:
            times = {who: min(found) for who, found in interleaved(runs, contenders.device, seconds).items()}
        rows.append(Row(name, times.get("base"), times.get("peft"), times["ours"]))
    return rows
