"""Whole models of ``peft`` before and after ``accelerate``, and our own wrapping, on all-MiniLM-L6-v2.

    python bench/peft_models.py [--json FILE] [--seconds S] [--only CASE ...] [--threads N] [--cpu-time]

Every figure is a best of many calls, the contenders taking turns in one process. The model is that of the demo;
``base`` is the encoder without adapters. ``peak`` is the memory that merge_and_unload adds, beside one layer's adapters
and beside the model.
"""

import argparse
import contextlib
import copy
import gc
import json
import sys
import time
import warnings

import peft
import torch

import lora_kernels as lk
from lora_kernels.bench.measure import facts
from lora_kernels.bench.timing import interleaved
from lora_kernels.demo.model import TARGETS, load

RANK = 16
CLOCK = time.perf_counter


def adapters(model, names, package=peft):
    """``model`` with adapters of rank 16 on every linear layer, all with random factors."""
    config = package.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)
    wrapped = package.get_peft_model(copy.deepcopy(model), config, names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    return wrapped.eval()


def tokens(rows, length):
    ids = torch.randint(1000, 20000, (rows, length), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


def best(calls, seconds, rounds=5):
    """name -> best seconds of a call; the calls take turns."""
    times = interleaved(calls, seconds=seconds, min_rounds=rounds, clock=CLOCK)
    return {name: min(found) for name, found in times.items()}


def forward(dtype, seconds):
    """1 x 32 tokens, one adapter."""
    base = load(dtype=dtype).encoder
    theirs, ours = adapters(base, ["a"]), adapters(base, ["a"], lk)
    turned = copy.deepcopy(theirs)
    lk.accelerate(turned)
    batch = tokens(1, 32)
    models = {"base": base, "peft": theirs, "accelerated": turned, "ours": ours}
    with torch.inference_mode():
        return best({name: lambda m=m: m(*batch) for name, m in models.items()}, seconds)


def rows(dtype, seconds):
    """32 rows of 1 and of 8 tokens, 8 adapters."""
    base, names = load(dtype=dtype).encoder, [f"a{i}" for i in range(8)]
    theirs = adapters(base, names)
    turned = copy.deepcopy(theirs)
    lk.accelerate(turned)
    ours, found = adapters(base, names, lk), {}
    for length in (1, 8):
        batch, wanted = tokens(32, length), [names[i % 8] for i in range(32)]
        calls = {"base": lambda b=batch: base(*b)}
        for name, model in (("peft", theirs), ("accelerated", turned), ("ours", ours)):
            calls[name] = lambda m=model, b=batch, n=wanted: m(*b, adapter_names=n)
        with torch.inference_mode():
            times = best(calls, seconds, rounds=3)
        found.update({f"{name}, {length} tokens": value for name, value in times.items()})
    return found


def merging(dtype, seconds):
    """merge_adapter and unmerge_adapter of the whole model."""
    base = load(dtype=dtype).encoder
    theirs, ours = adapters(base, ["a"]), adapters(base, ["a"], lk)
    turned = copy.deepcopy(theirs)
    lk.accelerate(turned)

    def there_and_back(model):
        model.merge_adapter()
        model.unmerge_adapter()

    models = {"peft": theirs, "accelerated": turned, "ours": ours}
    return best({name: lambda m=m: there_and_back(m) for name, m in models.items()}, seconds)


def peak(dtype, seconds):
    """Bytes that merge_and_unload adds at its peak, beside those of the model and of one layer's adapters."""
    found = {}
    for name, package in (("peft", peft), ("ours", lk)):
        model = adapters(load(dtype=dtype).encoder, ["a"], package)
        layer = max(
            sum(p.numel() * p.element_size() for n, p in m.named_parameters() if "lora_" in n)
            for m in model.modules()
            if hasattr(m, "base_layer")
        )
        weights = {p.data_ptr(): p.numel() * p.element_size() for n, p in model.named_parameters() if "lora_" not in n}
        found["model"], found["one layer's adapters"] = sum(weights.values()), layer
        found[name] = allocated(model.merge_and_unload)
    return found


def allocated(call):
    """The peak of what torch allocates in ``call`` above what there was, in bytes."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    level = top = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            top = max(top, level)
    del kept
    return top


CASES = {"forward": forward, "rows": rows, "merging": merging, "peak": peak}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="time that the process ran, not that passed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.cpu_time:
        global CLOCK
        CLOCK = time.process_time
    results = {}
    for name in arguments.only:
        for dtype in (torch.float32, torch.bfloat16):
            kind = f"{name}, {str(dtype).removeprefix('torch.')}"
            print(f"{kind} ...", file=sys.stderr, flush=True)
            with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
                warnings.simplefilter("ignore")
                results[kind] = CASES[name](dtype, arguments.seconds)
            print(kind + ": " + ", ".join(_text(name, item) for item in results[kind].items()), flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"facts": facts(), "cpu_time": arguments.cpu_time, "results": results}, file, indent=1)


def _text(case, item):
    name, value = item
    return f"{name} {value / 1e6:.3f} MB" if case == "peak" else f"{name} {1e3 * value:.2f} ms"


if __name__ == "__main__":
    main()
