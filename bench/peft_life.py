"""The cost of adapters' life against peft: layers in use, choosing, wrapping, loading and mixed batches.

    python bench/peft_life.py --json bench/results/peft_life_avx512.json [--seconds 2] [--only mixed]

Every row times the base model (where it has one), peft and this package in turns in one run, so that all see the same
machine; the figures to compare are the ratios.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import warnings

import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.bench.bounds import bound, bound_line, finish
from lora_kernels.bench.timing import interleaved

LAYERS, WIDTH, MAX_ROUNDS = 200, 16, 300


def chain(layers=LAYERS, width=WIDTH):
    """``layers`` tiny linear layers in a row."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])


def minilm(dtype=torch.float32):
    """A model of the size of MiniLM-L6 with random weights."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    torch.manual_seed(0)
    return BertModel(BertConfig(**sizes), add_pooling_layer=False).to(dtype).eval()


def wrapped(package, model, targets, names=("default",), r=8):
    """``model`` with adapters whose B is not zero."""
    config = {"r": r, "lora_alpha": 16, "target_modules": targets}
    made = package.get_peft_model(model, package.LoraConfig(**config), names[0])
    for name in names[1:]:
        made.add_adapter(name, package.LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.02
    return made.eval()


def sides(make):
    """``{"peft": …, "ours": …}``: what ``make(package)`` gives for each."""
    import peft

    return {name: make(package) for name, package in (("peft", peft), ("ours", lk))}


def without_grad(function):
    @torch.inference_mode()
    def run():
        return function()

    return run


def tiny_forward(grad):
    x, base = torch.randn(3, WIDTH), chain()
    base.requires_grad_(False)
    models = {"base": base, **sides(lambda p: wrapped(p, chain(), [str(i) for i in range(LAYERS)]))}
    runs = {name: (lambda model=model: model(x)) for name, model in models.items()}
    return runs if grad else {name: without_grad(run) for name, run in runs.items()}


def tiny_mixed():
    x, names = torch.randn(3, WIDTH), ["a", "b", "c"]
    base = chain()
    models = sides(lambda p: wrapped(p, chain(), [str(i) for i in range(LAYERS)], names))
    runs = {name: (lambda model=model: model(x, adapter_names=names)) for name, model in models.items()}
    return {name: without_grad(run) for name, run in {"base": lambda: base(x), **runs}.items()}


def tiny_set():
    def run(model):
        model.set_adapter("b")
        model.set_adapter("a")

    models = sides(lambda p: wrapped(p, chain(), [str(i) for i in range(LAYERS)], ("a", "b")))
    return {name: (lambda model=model: run(model)) for name, model in models.items()}


def tiny_disable():
    x, base = torch.randn(3, WIDTH), chain()

    def run(model):
        with model.disable_adapter():
            return model(x)

    models = sides(lambda p: wrapped(p, chain(), [str(i) for i in range(LAYERS)]))
    runs = {name: (lambda model=model: run(model)) for name, model in models.items()}
    return {name: without_grad(run) for name, run in {"base": lambda: base(x), **runs}.items()}


def wrap():
    targets = [str(i) for i in range(32)]
    plain = chain(32)
    fresh = [copy.deepcopy(plain) for _ in range(2 * MAX_ROUNDS + 2)]  # copying is no part of what is timed
    return sides(lambda p: lambda: p.get_peft_model(fresh.pop(), p.LoraConfig(target_modules=targets)))


def load():
    folder = tempfile.mkdtemp()
    targets = [str(i) for i in range(32)]
    wrapped(lk, chain(32), targets).save_pretrained(folder)
    models = sides(lambda p: wrapped(p, chain(32), targets))

    def run(model):
        model.load_adapter(folder, "loaded")
        model.delete_adapter("loaded")

    return {name: (lambda model=model: run(model)) for name, model in models.items()}


def minilm_forward(dtype):
    ids = torch.randint(0, 30000, (1, 32))
    base = minilm(dtype)
    models = {"base": base, **sides(lambda p: wrapped(p, minilm(dtype), "all-linear", r=16))}
    return {name: without_grad(lambda model=model: model(input_ids=ids)) for name, model in models.items()}


def minilm_mixed(tokens):
    """32 samples of ``tokens`` tokens, of 8 adapters in turn."""
    ids = torch.randint(0, 30000, (32, tokens))
    adapters = [f"a{i}" for i in range(8)]
    names = [adapters[i % 8] for i in range(32)]
    base = minilm()
    models = sides(lambda p: wrapped(p, minilm(), "all-linear", adapters, r=16))
    runs = {n: (lambda model=model: model(input_ids=ids, adapter_names=names)) for n, model in models.items()}
    return {name: without_grad(run) for name, run in {"base": lambda: base(input_ids=ids), **runs}.items()}


class LlamaBlock(nn.Module):
    """The linear layers of a block of Llama 3 8B."""

    def __init__(self):
        super().__init__()
        options = {"bias": False, "dtype": torch.bfloat16}
        for name, rows in {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024, "o_proj": 4096}.items():
            self.add_module(name, nn.Linear(4096, rows, **options))
        self.gate_proj, self.up_proj = (nn.Linear(4096, 14336, **options) for _ in range(2))
        self.down_proj = nn.Linear(14336, 4096, **options)


def merging(model):
    """Merge and unmerge; "copy" is what no way to do it can be much below: each weight read and written twice."""

    def run(model):
        model.merge_adapter()
        model.unmerge_adapter()

    models = sides(lambda p: wrapped(p, model(), "all-linear", r=16))
    weights = [part.weight.detach() for part in models["ours"].base_model.lora_layers()]
    copies = [weight.clone() for weight in weights]

    def copy_twice():
        for _ in range(2):
            for weight, other in zip(weights, copies, strict=True):
                other.copy_(weight)

    return {"copy": copy_twice, **{name: (lambda model=model: run(model)) for name, model in models.items()}}


class Experts(nn.Module):
    """A block of 16 experts as transformers fuses them; each token takes two."""

    def __init__(self, width=256):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(width, 16)
        self.up = nn.Parameter(torch.randn(16, 2 * width, width) / 16)
        self.down = nn.Parameter(torch.randn(16, width, 2 * width) / 16)

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, place = torch.where(chosen == expert)
            hidden = nn.functional.silu(nn.functional.linear(x[rows], self.up[expert]))
            part = nn.functional.linear(hidden, self.down[expert]) * weights[rows, place, None]
            y.index_add_(0, rows, part)
        return y


def experts_forward(tokens):
    x = torch.randn(tokens, 256)

    def make(package):
        config = package.LoraConfig(r=8, target_modules=[], target_parameters=["0.up", "0.down"])
        return package.get_peft_model(nn.Sequential(Experts()), config).eval()

    models = {"base": Experts(), **sides(make)}
    return {name: without_grad(lambda model=model: model(x)) for name, model in models.items()}


def dora(dtype):
    """One DoRA layer of 2048 x 2048 on 32 rows."""
    import peft

    x = torch.randn(32, 2048).to(dtype)

    def layer():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2048, 2048, bias=False)).to(dtype).eval()

    def make(package):
        config = package.LoraConfig(r=16, target_modules=["0"], use_dora=True, init_lora_weights=False)
        return package.get_peft_model(layer(), config).eval()

    models = {"base": layer(), **sides(make), "accelerated": make(peft)}
    lk.accelerate(models["accelerated"])
    return {name: without_grad(lambda model=model: model(x)) for name, model in models.items()}


def trained_rows():
    ids = torch.randint(0, 30000, (1, 32))

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(30000, 384), nn.Linear(384, 30000, bias=False)

        def forward(self, ids):
            return self.head(torch.tanh(self.embed(ids)))

    def make(package):
        rows = {"embed": list(range(100)), "head": list(range(100))}
        config = package.LoraConfig(target_modules=["norm"], trainable_token_indices=rows)
        return package.get_peft_model(nn.ModuleDict({"lm": Head(), "norm": nn.Linear(1, 1)}), config).eval()

    models = {"base": Head(), **{name: model.base_model.model["lm"] for name, model in sides(make).items()}}
    return {name: without_grad(lambda model=model: model(ids)) for name, model in models.items()}


def over(other, limit):
    """A bound: our time over that of ``other``, at most ``limit``."""
    return lambda best: (f"ours / {other}", limit, best["ours"] / best[other], False)


def faster(limit):
    """A bound: PEFT's time over ours, at least ``limit``."""
    return lambda best: ("PEFT / ours", limit, best["peft"] / best["ours"], True)


def of_the_most(share, other):
    """A bound where ``other`` is what no way can be much below: PEFT over ours, at least ``share`` of PEFT over it."""
    what = f"PEFT / ours (bound: {share:.0%} of PEFT / {other})"
    return lambda best: (what, share * best["peft"] / best[other], best["peft"] / best["ours"], True)


# Row: (what makes the contenders, calls a round counts as, bounds).
ROWS = {
    "200 tiny linears, inference": (lambda: tiny_forward(False), 1, (over("base", 2.5 / 1.1),)),
    "200 tiny linears, with grad": (lambda: tiny_forward(True), 1, (over("base", 4.5 / 1.1),)),
    "200 tiny linears, mixed batch of 3": (tiny_mixed, 1, (over("base", 5 / 1.1),)),
    "200 tiny linears, set_adapter": (tiny_set, 2, (faster(7.9),)),
    "200 tiny linears, disable_adapter() and forward": (tiny_disable, 1, (over("base", 3 / 1.1),)),
    "get_peft_model, 32 tiny layers": (wrap, 1, (faster(4),)),
    "load_adapter, 32 tiny layers": (load, 1, (faster(2),)),
    "MiniLM, 1 x 32, float32": (lambda: minilm_forward(torch.float32), 1, (over("base", 1.10), faster(1.15))),
    "MiniLM, 1 x 32, bfloat16": (lambda: minilm_forward(torch.bfloat16), 1, (faster(1.4),)),
    "MiniLM, mixed batch, 32 rows, 8 adapters": (lambda: minilm_mixed(1), 1, (faster(3),)),
    "MiniLM, mixed batch, 32 x 16 tokens, 8 adapters": (lambda: minilm_mixed(16), 1, (of_the_most(0.75, "base"),)),
    "DoRA, 2048 x 2048, 32 rows, float32": (lambda: dora(torch.float32), 1, (faster(4),)),
    "DoRA, 2048 x 2048, 32 rows, bfloat16": (lambda: dora(torch.bfloat16), 1, (faster(4),)),
    "16 experts of 256 x 512, 4 tokens": (lambda: experts_forward(4), 1, (faster(1),)),
    "16 experts of 256 x 512, 64 tokens": (lambda: experts_forward(64), 1, (faster(1),)),
    "100 trained rows of embedding and head, 30000 x 384, 32 tokens": (trained_rows, 1, (faster(1),)),
    "MiniLM, float32, merge_adapter and unmerge_adapter": (lambda: merging(minilm), 1, (of_the_most(0.75, "copy"),)),
    "a block of Llama 3 8B, bfloat16, merge_adapter and unmerge_adapter": (
        lambda: merging(LlamaBlock),
        1,
        (over("copy", 2.5), faster(10)),
    ),
}


def measure(row, seconds):
    """The best and the median seconds of each contender, and its bounds as targets."""
    make, calls, bounds = ROWS[row]
    times = interleaved(make(), seconds=seconds, min_rounds=5, max_rounds=MAX_ROUNDS)
    best = {name: min(found) / calls for name, found in times.items()}
    median = {name: statistics.median(found) / calls for name, found in times.items()}
    targets = [bound(row, *of(best)) for of in bounds]
    return {"row": row, "best": best, "median": median}, targets


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    rows = [row for row in ROWS if options.only in row]
    results, targets = [], []
    for index, row in enumerate(rows, 1):
        print(f"[{index}/{len(rows)}] {row}", file=sys.stderr, flush=True)
        result, found = measure(row, options.seconds)
        results.append(result)
        targets += found
        best = "  ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in result["best"].items())
        print(f"{row}: {best}")
        for target in found:
            print("    " + bound_line(target))
    return finish(targets, options.json, results)


if __name__ == "__main__":
    sys.exit(main())
