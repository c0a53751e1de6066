"""Times the candidates of every problem and keeps the fastest; a run that was cut short goes on where it stopped."""

import dataclasses
import sys
import time
from pathlib import Path

import torch

from .. import arguments
from ..disk.progress import Progress
from ..ops import triton_backend, tuning
from .candidates import Gpu, candidates, problems

SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))  # K, N
GROUPS = ((4096, (4096, 1024, 1024)), (4096, (14336, 14336)))  # K, N of each projection: q, k, v; gate, up
TOKENS = (1, 16, 64, 128, 512, 2048, 8192)
RANKS = (16, 64)
SLOTS = (8, 64)
# Shared memory of a block that every GPU from sm_80 on has, where torch does not say how much.
_LEAST_SHARED = 101376


@dataclasses.dataclass
class Outcome:
    """The fastest configuration and its seconds a call; ``by_rule``: the rule's, None where it could not run;
    ``skipped``: {configuration: why it could not run}."""

    best: object
    seconds: float
    by_rule: float | None
    skipped: dict


def problem():
    """Why nothing can be tuned here; None when it can."""
    if triton_backend.interpreted():
        return "TRITON_INTERPRET is set: the interpreter's times mean nothing"
    return triton_backend.problem()


def gpu_at_hand():
    """(:class:`~.candidates.Gpu`, device)."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    shared = getattr(properties, "shared_memory_per_block_optin", _LEAST_SHARED)
    capability = (properties.major, properties.minor)
    return Gpu(properties.name, capability, properties.multi_processor_count, shared), "cuda"


def fastest(call, op, found, timer, seconds):
    """The :class:`Outcome` over the configurations ``found``, the rule's first.

    Args:
        call: a :class:`~.calls.Call`.
        timer: ``timer(runs, calls, seconds=…)`` returns {name: seconds a call}, as
            :func:`~lora_kernels.bench.cuda_timing.interleaved`.

    Raises:
        RuntimeError: no configuration could run.
    """
    runs, skipped = {}, {}

    def under(config):
        def run():
            with tuning.trial(op, config):
                call.run()

        return run

    for config in found:
        try:
            under(config)()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            runs[config] = under(config)
        except Exception as error:  # too much shared memory and the like: not a candidate on this GPU
            skipped[config] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    if not runs:
        raise RuntimeError(f"none of {len(found)} configurations could run: {next(iter(skipped.values()))}")
    times = timer(runs, call.copies, seconds=seconds)
    best = min(times, key=times.get)
    return Outcome(best, times[best], times.get(found[0]), skipped)


def main(argv=None):
    args = _arguments(argv)
    reason = problem()
    if reason is not None:
        print(f"lora_kernels tune: needs a GPU on which the Triton kernels run: {reason}", file=sys.stderr)
        return 2
    gpu, device = gpu_at_hand()
    path = args.out or tuning.file_of(gpu.name)
    try:
        known = tuning.read(path, gpu.name) if path.is_file() else {}
    except ValueError as error:
        print(f"lora_kernels tune: {error}", file=sys.stderr)
        return 2
    every = problems(args.op, args.shape, args.tokens, args.rank, args.slots, args.group)
    todo = [each for each in every if args.again or each.key not in known.get(each.op, {})]
    if len(todo) < len(every):
        print(f"{len(every) - len(todo)} of {len(every)} shapes were measured before (--again measures them anew)")
    failed = _measure_all(todo, gpu, device, path, known, args)
    print(f"wrote {path}" if path.is_file() else "nothing was written")
    return 1 if failed else 0


def _measure_all(todo, gpu, device, path, known, args):
    """Measures and writes one problem after the other; how many had no configuration that could run."""
    from ..bench.cuda_timing import interleaved
    from .calls import call_of

    failed, began = 0, time.monotonic()
    progress = Progress("tune", len(todo), quiet=args.quiet, unit="shapes")
    for index, each in enumerate(todo):
        if args.budget is not None and time.monotonic() - began > args.budget:
            print(f"out of time: {len(todo) - index} shapes are left; the same command goes on with them")
            break
        title = f"{each.op} {each.key}"
        try:
            call = call_of(each, getattr(torch, args.dtype), device)
            outcome = fastest(call, each.op, candidates(each, gpu), interleaved, args.seconds)
        except RuntimeError as error:
            print(f"{title}: {error}", file=sys.stderr)
            failed += 1
        else:
            known.setdefault(each.op, {})[each.key] = outcome.best
            tuning.write(path, gpu.name, known)
            print(f"{title:<48}{_line(outcome)}", flush=True)
            for config, why in outcome.skipped.items():
                print(f"    {config} can not run: {why}", file=sys.stderr)
        progress.advance(1)
    progress.close()
    return failed


def _line(outcome):
    rule = (
        "the rule's can not run" if outcome.by_rule is None else f"{outcome.by_rule / outcome.seconds:.2f} x its rule"
    )
    return f"{outcome.seconds * 1e6:9.1f} us ({rule})  {outcome.best}"


def _arguments(argv):
    parser = arguments.parser(
        "tune", "Measures Triton tiles on the GPU at hand and keeps the fastest. A run that was stopped continues when "
        "the same command is given again. Exit code 1 when a shape had none that runs, 2 where there is no GPU for it."
    )  # fmt: skip
    parser.add_argument("--op", nargs="+", choices=tuning.OPS, default=list(tuning.OPS), metavar="OP",
                        help=f"of {', '.join(tuning.OPS)}; default: all")  # fmt: skip
    parser.add_argument("--shape", nargs="+", type=_shape, default=SHAPES, metavar="KxN",
                        help="in_features x out_features; default: Llama 3 8B's")  # fmt: skip
    parser.add_argument("--group", nargs="*", type=_group, default=GROUPS, metavar="KxN,N",
                        help="the same of projections that share their input; default: Llama 3 8B's")  # fmt: skip
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="M",
                        help=f"rows of x; default: {_words(TOKENS)}")  # fmt: skip
    parser.add_argument("--rank", nargs="+", type=int, default=RANKS, metavar="R", help=f"default: {_words(RANKS)}")
    parser.add_argument("--slots", nargs="+", type=int, default=SLOTS, metavar="S",
                        help=f"of the ops of many adapters; default: {_words(SLOTS)}")  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16",
                        help="of x, weight and adapters; default: %(default)s")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0.2,
                        help="for each shape, compiling aside; default: %(default)s")  # fmt: skip
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="after which no new shape is begun")
    parser.add_argument("--again", action="store_true", help="measure what the file holds already, too")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="to write; default: the one that the package reads for this GPU")  # fmt: skip
    args = parser.parse_args(argv)
    if min((*args.tokens, *args.rank, *args.slots)) < 1 or args.seconds <= 0 or (args.budget or 1) <= 0:
        parser.error("--tokens, --rank, --slots, --seconds, --budget: expected numbers above 0")
    return args


def _words(numbers):
    return " ".join(map(str, numbers))


def _shape(text):
    in_features, out_features = (int(part) for part in text.lower().split("x"))
    if min(in_features, out_features) < 1:
        raise ValueError(text)
    return in_features, out_features


def _group(text):
    in_features, widths = text.lower().split("x")
    found = int(in_features), tuple(int(width) for width in widths.split(","))
    if min(found[0], *found[1]) < 1:
        raise ValueError(text)
    return found


_group.__name__ = "KxN,N such as 4096x4096,1024,1024"
_shape.__name__ = "KxN such as 4096x1024"  # what argparse says was expected
