"""`python -m lora_kernels demo`: trains adapters, saves, loads, serves, and compares; exit code 1 if a claim fails."""

import pathlib
import sys
import time

import torch

from .. import arguments, check
from ..env import collect as environment
from ..ops import proof
from . import compare, report, serve, train
from .data import collect
from .jobs import rows_of
from .model import MissingPackage, load, tokenizer
from .progress import bar
from .tasks import TASKS, split


def main(argv=None):
    args = _arguments(argv)
    try:
        return _run(args)
    except MissingPackage as error:
        print(f"lora_kernels demo: {error}", file=sys.stderr)
        return 2


def _arguments(argv):
    parser = arguments.parser("demo", __doc__.partition(": ")[2].capitalize())
    parser.add_argument("--device", type=arguments.device, help="cpu or cuda; default: cuda where torch finds a GPU")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of the encoder; auto: bfloat16 on a GPU or a CPU that has it, else float32")  # fmt: skip
    parser.add_argument("--out", default="demo_out", type=pathlib.Path, metavar="FOLDER",
                        help="adapters, plot and report.json go here; default: %(default)s")  # fmt: skip
    parser.add_argument("--seed", default=0, type=int, help="of weights, batches and examples; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few examples: a test of the path, not of the adapters")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


def _run(args):
    tokenizer()  # what is not installed is named before any work is done
    if torch.device(args.device).type == "cuda":
        _prove_kernels()
    start = time.perf_counter()
    dtype = _dtype(args)
    torch.manual_seed(args.seed)
    _say(f"encoder all-MiniLM-L6-v2, {dtype}, on {args.device}; text: docstrings of the standard library")
    docs = collect(lambda files: bar(files, "read the library"))
    results, paths, texts = _train(args, docs, dtype)
    print(report.accuracies(results))
    _say("loading the saved adapters into fresh models; correctness")
    claims = [] if args.quick else [_margin_claim(result) for result in results]
    contenders = compare.Contenders(paths, args.device, dtype)
    adapters = {name: serve.adapters_of(contenders.ours, name) for name in paths}
    oracle = serve.Oracle(contenders.plain, adapters)
    names = [*paths, None]
    batch = rows_of(texts, 16, args.device)
    claims += serve.check_mixed(contenders.pool, oracle, batch, [names[i % len(names)] for i in range(16)])
    claims += compare.check_outputs(contenders, oracle, texts)
    claims += serve.check_merging(contenders.ours, oracle, batch, list(paths))
    print(report.claims(claims))
    _say("timing, contenders in turns, best of many")
    sizes = (1, 4) if args.quick else (1, 8, 32)
    rows = compare.measure(contenders, texts, sizes, seconds=0.2 if args.quick else 3.0)
    print(report.times(rows))
    drawn = report.plot(rows, args.out / "demo.png")
    facts = {"versions": environment()["versions"], "dtype": str(dtype), "device": args.device}
    report.write_json(args.out / "report.json", results, claims, rows, facts)
    _say(f"written to {args.out}: adapters, report.json" + (", demo.png" if drawn else " (no plot: no matplotlib)"))
    failed = [claim.text for claim in claims if not claim.holds]
    _say(f"{len(claims) - len(failed)} of {len(claims)} claims hold; {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


def _prove_kernels():
    """Checks the GPU's kernels before their first use on it: ``auto`` takes what has passed."""
    if not any(proof.of_device(torch.cuda.current_device()).values()):
        _say("first use of this GPU: checking its kernels")
        check.main([])


def _train(args, docs, dtype):
    """Trains and saves one adapter a task: results, {task: folder}, held-out texts."""
    results, paths, texts = [], {}, []
    per_label, held_out_per_label, epochs = (24, 16, 1) if args.quick else (400, 250, 3)
    for task in TASKS:
        examples, held_out = split(docs, task, per_label, held_out_per_label, args.seed)
        _say(f"{task.name}: {task.question}")
        classifier = load(args.device, dtype)
        frozen = train.frozen_accuracies(classifier, examples, held_out, epochs, args.seed, args.device)
        model = train.train_adapter(classifier, task, examples, epochs, args.seed, args.device)
        accuracy = train.adapter_accuracy(model, held_out, args.device)
        results.append(train.Result(task.name, len(examples), len(held_out), *frozen, accuracy))
        model.save_pretrained(args.out / "adapters")
        paths[task.name] = args.out / "adapters" / task.name
        texts += [example.text for example in held_out[:8]]
    return results, paths, texts


def _margin_claim(result):
    return serve.Claim(
        f"{result.task}: the adapter beats the frozen encoder",
        result.margin > 0,
        f"{result.margin:+.3f} on {result.num_held_out} held-out texts",
    )


def _dtype(args):
    if args.dtype != "auto":
        return getattr(torch, args.dtype)
    if args.device.startswith("cuda") or "avx512bf16" in environment()["cpu"]["features"]:
        return torch.bfloat16
    return torch.float32  # bfloat16 is emulated on other processors


def _say(text):
    print(f"\n== {text}", flush=True)
