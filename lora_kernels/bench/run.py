"""`python -m lora_kernels bench`: ours against the base alone, in-place addmm_ and PEFT, in one run."""

import argparse
import pathlib
import sys

import torch

from . import report
from .cases import DTYPES, GROUPS, NUM_TOKENS, OPS, SHAPES, Case, suite
from .contenders import PEFT_INSTALLED
from .measure import facts, measure
from .targets import targets


def main(argv=None):
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    known = facts()
    print(f"{known['cpu']['model']}, {known['threads']} threads, torch {known['versions']['torch']}, {args.device}")
    if not PEFT_INSTALLED:
        print("PEFT is not installed: its column stays empty (pip install peft)")
    about = known | {"command": ["bench", *(argv or sys.argv[2:])]}

    def save(results, found=()):  # after each case, so that a run that is cut short has what it measured
        if args.json:
            report.write_json(args.json, about, results, found)

    code = 0
    if args.suite == "targets":
        results, found = _targets(args, save)
        missed = sum(value is not None and not target.met(value) for target, value in found)
        print(f"\n{len(found)} bounds, {missed} missed, {sum(value is None for _, value in found)} not run")
        code = 1 if missed else 0
    else:
        results = _cases(args, save)
    if args.plot:
        try:
            report.plot(args.plot, results)
        except ImportError:
            print("--plot: matplotlib is not installed", file=sys.stderr)
            return 2
    return code


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="lora_kernels bench", description=__doc__.partition(": ")[2])
    parser.add_argument("--suite", choices=("default", "full", "quick", "targets"), default="default")
    parser.add_argument("--op", nargs="+", choices=OPS, help="with --shape and the like: all combinations")
    parser.add_argument("--shape", nargs="+", choices=[*SHAPES, *GROUPS], help="named shapes")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M", help="rows of the forward and the train cases")
    parser.add_argument("--rank", nargs="+", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args(argv)
    for name in ("tokens", "rank"):
        if any(value < 1 for value in getattr(args, name) or ()):
            parser.error(f"--{name}: expected numbers >= 1, got {getattr(args, name)}")
    if set(args.shape or ()) & set(GROUPS) and args.op != ["grouped"]:
        parser.error(f"--shape: {', '.join(GROUPS)} go with --op grouped")
    if args.seconds <= 0 or (args.threads is not None and args.threads < 1):
        parser.error("--seconds, --threads: expected a number above 0")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: torch finds no CUDA device")
    return args


def _cases(args, save):
    chosen = _chosen(args)
    print(f"\n{report.HEADER}")
    results = []
    for case in chosen:
        results.append(measure(case, args.device, args.seconds))
        print(report.line(results[-1]), flush=True)
        save(results)
    print(f"\n{report.NOTE}")
    return results


def _chosen(args):
    """The suite, or every combination of what was named."""
    named = (args.op, args.shape, args.dtype, args.tokens, args.rank)
    if not any(named):
        return suite(args.suite)
    cases = [
        _case(op, shape, m, rank, dtype)
        for op in args.op or ("forward",)
        for shape in args.shape or ("llama3-8b-qo",)
        for dtype in args.dtype or ("bfloat16",)
        for rank in args.rank or (16,)
        for m in args.tokens or NUM_TOKENS
    ]
    return list(dict.fromkeys(cases))


def _case(op, shape, num_tokens, rank, dtype):
    if op == "overhead":
        return Case(op, "4x4", 4, 4, dtype)
    return Case(op, shape, num_tokens if op in ("forward", "multi", "grouped", "train") else 0, rank, dtype)


def _targets(args, save):
    wanted = [target for target in targets() if not args.op or target.case.op in args.op]
    print(f"\n{report.TARGET_HEADER}")
    results, found = {}, []
    for target in wanted:
        if target.case not in results:
            results[target.case] = measure(target.case, args.device, args.seconds)
        value = target.measured(results[target.case])
        found.append((target, value))
        print(report.target_line(target, value), flush=True)
        save(list(results.values()), found)
    return list(results.values()), found
