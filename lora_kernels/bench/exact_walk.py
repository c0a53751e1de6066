"""Random merges, unmerges and switches of adapters over a model: what must leave every bit where it was."""

import random

import torch

from ..config import LoraConfig
from ..model import get_peft_model

TARGETS = ["query", "key", "value", "dense", "word_embeddings", "position_embeddings"]


def adapters_on(model, count=4):
    """``model`` with ``count`` adapters of other ranks, scalings and sizes of update; every second one is bf16."""
    torch.manual_seed(1)
    for i in range(count):
        config = LoraConfig(r=2 + 3 * i, lora_alpha=4 + i, target_modules=TARGETS, use_rslora=i == 2)
        half = {"autocast_adapter_dtype": i % 2 == 0}
        if i == 0:
            model = get_peft_model(model, config, "adapter0", **half)
        else:
            model.add_adapter(f"adapter{i}", config, **half)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_" in name:
                factor.normal_(0, 0.02)
    return model.eval()


def random_walk(model, steps, seed=0, progress=None):
    """``steps`` exact operations in random order, then unmerges. Returns how often each was done.

    Up to three adapters are merged at a time; those that leave are taken from any place of the stack.
    """
    draw = random.Random(seed)
    names, merged = list(model.peft_config), []
    counts = {"merge": 0, "unmerge": 0, "switch": 0}
    for step in range(steps):
        free = [name for name in names if name not in merged]
        possible = [op for op, can in (("merge", free and len(merged) < 3), ("unmerge", merged),
                                       ("switch", merged and free)) if can]  # fmt: skip
        op = draw.choice(possible)
        if op == "merge":
            merged.append(draw.choice(free))
            model.merge_adapter(merged[-1:], exact=True)
        elif op == "unmerge":
            merged.remove(name := draw.choice(merged))
            model.unmerge_adapter([name])
        else:
            place = draw.randrange(len(merged))
            old, merged[place] = merged[place], draw.choice(free)
            model.switch_adapter(old, merged[place])
        counts[op] += 1
        if progress is not None:
            progress(step + 1, op)
    if merged:
        model.unmerge_adapter()
    return counts
