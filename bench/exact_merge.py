"""Exact merging: its time beside a plain merge and PEFT's, bits a weight, and a thousand operations over an encoder.

    python bench/exact_merge.py --json bench/results/exact_merge.json

Times are of a 4096 x 4096 weight, rank 16, an update of 0.04 times the weight: all sides in turn in each round, the
least of the rounds. An exact merge is followed by its unmerge, a plain one by the opposite sign, so that the weight
stays what it is. PEFT's side is ``merge()`` and ``unmerge()`` of a ``peft`` linear layer over the same weight.
"""

import argparse
import pathlib
import sys
import time

import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.bench.bounds import bound, bound_line, finish
from lora_kernels.bench.exact_walk import adapters_on, random_walk

SIZE, RANK = 4096, 16
RELATIVE = (0.008, 0.04, 0.16, 0.8)
BITS = {torch.bfloat16: (0.06, 0.15, 0.35, 1.05), torch.float32: (0.09, 0.22, 0.5, 1.3)}


def problem(dtype, relative, rank=RANK, size=SIZE, adapter_dtype=torch.float32):
    """Weights N(0, 0.02²) and factors whose product is ``relative`` times as large; scaling 1."""
    weight = (torch.randn(size, size) * 0.02).to(dtype)
    a, b = torch.randn(rank, size) / rank**0.5, torch.randn(size, rank) * 0.02 * relative
    return weight, a.to(adapter_dtype), b.to(adapter_dtype)


def peft_layer(weight, a, b):
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = nn.Linear(SIZE, SIZE, bias=False, dtype=weight.dtype)
    layer = Linear(base, "default", config=LoraConfig(r=RANK, lora_alpha=RANK), r=RANK, lora_alpha=RANK)
    with torch.no_grad():
        base.weight.copy_(weight)
        layer.lora_A["default"].weight.data = a.clone()
        layer.lora_B["default"].weight.data = b.clone()
    return layer


def timed(call):
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def times(dtype, adapter_dtype, rounds, say):
    """name -> least seconds."""
    weight, *low = problem(dtype, 0.04, adapter_dtype=adapter_dtype)
    _, *other = problem(dtype, 0.04, adapter_dtype=adapter_dtype)
    _, *double = problem(dtype, 0.04, 2 * RANK, adapter_dtype=adapter_dtype)
    exact, plain, wide, switched = (weight.clone() for _ in range(4))
    theirs, found = peft_layer(weight, *low), {}

    def note(name, call):
        seconds, result = timed(call)
        found[name] = min(seconds, found.get(name, seconds))
        return result

    for turn in range(rounds):
        sign = 1.0 - 2 * (turn % 2)
        residual = note("exact merge", lambda: lk.ops.merge_exact_(exact, *low, 1.0))
        note("merge_", lambda s=sign: lk.ops.merge_(plain, *low, s))
        note("exact unmerge", lambda r=residual: lk.ops.unmerge_exact_(exact, *low, 1.0, r))
        note("merge_ of rank 32", lambda s=sign: lk.ops.merge_(wide, *double, s))
        pair = ((*low, 1.0), (*other, 1.0)) if turn % 2 else ((*other, 1.0), (*low, 1.0))
        note("switch_", lambda p=pair: lk.ops.switch_(switched, *p))
        residual = lk.ops.merge_exact_(exact, *low, 1.0)
        terms = (*low, 1.0), (*other, 1.0)
        residual = note("exact switch", lambda t=terms, r=residual: lk.ops.switch_exact_(exact, *t, r))
        lk.ops.unmerge_exact_(exact, *other, 1.0, residual)
        note("PEFT merge", theirs.merge)
        note("PEFT unmerge", theirs.unmerge)
        say(f"{turn + 1} of {rounds} rounds")
    assert torch.equal(exact, weight)
    return found


def bits(dtype):
    """Bits a weight, of everything a residual stores, for each relative size of the update."""
    found = []
    for relative in RELATIVE:
        weight, a, b = problem(dtype, relative, size=2048)
        found.append(lk.ops.merge_exact_(weight, a, b, 1.0).bits_per_weight)
    return found


def walk(steps, say):
    """Random operations over MiniLM in bf16; whether every bit is the published one at the end."""
    from lora_kernels.demo.model import load

    model = adapters_on(load(dtype=torch.bfloat16).encoder)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    seconds, counts = timed(lambda: random_walk(model, steps, progress=lambda n, op: say(f"{n} of {steps}: {op}")))
    changed = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
    return {"steps": steps, "seconds": seconds, "counts": counts, "tensors": len(before), "changed": changed}


def of_times(case, t):
    fastest = max(t["exact merge"], t["exact unmerge"])
    return [
        bound(case, "exact merge / merge_", 4.0, t["exact merge"] / t["merge_"]),
        bound(case, "exact unmerge / merge_", 4.0, t["exact unmerge"] / t["merge_"]),
        bound(case, "PEFT's merge / exact merge", 5.0, t["PEFT merge"] / t["exact merge"], True),
        bound(case, "PEFT's unmerge / exact unmerge", 5.0, t["PEFT unmerge"] / t["exact unmerge"], True),
        bound(case, "switch_ / merge_ of the summed rank", 1.2, t["switch_"] / t["merge_ of rank 32"]),
        bound(case, "exact switch / exact merge and unmerge", 1.0, t["exact switch"] / (fastest * 2)),
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=1000, help="of the walk over the encoder; 0 leaves it out")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    def say(text):
        if sys.stderr.isatty():
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)

    isa = lk.env.collect()["backends"]["cpu"]["detail"]
    targets, seconds = [], {}
    short = {torch.bfloat16: "bf16", torch.float32: "float32"}
    for dtype, adapter in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32,) * 2):
        case = f"{SIZE}², r={RANK}, {short[dtype]} weight, {short[adapter]} adapter, {isa}"
        seconds[case] = times(dtype, adapter, args.rounds, say)
        targets += of_times(case, seconds[case])
    for dtype, limits in BITS.items():
        for relative, limit, measured in zip(RELATIVE, limits, bits(dtype), strict=True):
            targets.append(bound(f"{short[dtype]}, update {relative} × weight", "bits a weight", limit, measured))
    found = walk(args.steps, say) if args.steps else None
    if found:
        case = f"MiniLM in bf16, {found['steps']} random merges, unmerges and switches"
        targets.append(bound(case, "tensors that changed", 0, len(found["changed"])))
    for case, values in seconds.items():
        print(case, *(f"  {name}: {value * 1e3:.2f} ms" for name, value in values.items()), sep="\n")
    print(*map(bound_line, targets), sep="\n")
    return finish(targets, args.json, seconds=seconds, walk=found)


if __name__ == "__main__":
    sys.exit(main())
