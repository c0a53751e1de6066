"""`python -m lora_kernels bench`: ours against the base alone, in-place addmm_ and PEFT, in one run."""

import importlib.util
import sys

import torch

from .. import arguments
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
        report.plot(args.plot, results)
    return code


def _arguments(argv):
    parser = arguments.parser(
        "bench", "Ours against the base alone, in-place addmm_ and PEFT, in one run: a suite, or with --op, --shape, "
        "--dtype, --tokens and --rank all combinations. Exit code 1 when --suite targets misses a bound."
    )  # fmt: skip
    parser.add_argument("--suite", choices=("default", "full", "quick", "targets"), default="default",
                        help="targets: the cases with bounds, --op picks among them; default: %(default)s")  # fmt: skip
    shapes = [*SHAPES, *GROUPS]
    parser.add_argument("--op", nargs="+", choices=OPS, metavar="OP", help=f"of {', '.join(OPS)}; default: forward")
    parser.add_argument("--shape", nargs="+", choices=shapes, metavar="SHAPE",
                        help=f"of {', '.join(shapes)}; default: llama3-8b-qo")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE",
                        help=f"of {', '.join(DTYPES)}; default: bfloat16")  # fmt: skip
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M",
                        help=f"rows of x; default: {' '.join(map(str, NUM_TOKENS))}")  # fmt: skip
    parser.add_argument("--rank", nargs="+", type=int, metavar="R", help="default: 16")
    parser.add_argument("--device", default="cpu", type=arguments.device, help="cpu or cuda; default: %(default)s")
    parser.add_argument("--threads", type=int, help="of torch; default: as torch has them")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case; default: %(default)s")
    parser.add_argument("--json", type=arguments.new_file, metavar="FILE", help="results and facts of the machine")
    parser.add_argument("--plot", type=arguments.new_file, metavar="FILE", help="a picture of the ratios (matplotlib)")
    args = parser.parse_args(argv)
    for name in ("tokens", "rank"):
        if any(value < 1 for value in getattr(args, name) or ()):
            parser.error(f"--{name}: expected numbers >= 1, got {getattr(args, name)}")
    if set(args.shape or ()) & set(GROUPS) and args.op != ["grouped"]:
        parser.error(f"--shape: {', '.join(GROUPS)} go with --op grouped")
    if args.seconds <= 0 or (args.threads is not None and args.threads < 1):
        parser.error("--seconds, --threads: expected a number above 0")
    unused = [name for name in ("op", "shape", "dtype", "tokens", "rank") if getattr(args, name)]
    if args.suite == "targets":
        unused = [name for name in unused if name != "op"]
    if args.suite != "default" and unused:
        parser.error(f"--suite {args.suite}: its cases are fixed, it does not go with --{', --'.join(unused)}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: matplotlib is not installed")
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
