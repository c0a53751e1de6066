"""``python -m lora_kernels merge BASE_DIR ADAPTER_DIR... -o OUT``."""

import sys

from .. import arguments
from ..io.checkpoint import CheckpointError
from .merge import merge_checkpoint


def _parser():
    parser = arguments.parser(
        "merge",
        "Merges LoRA adapters into a safetensors checkpoint, tensor by tensor, without building the model. "
        "A run that was stopped continues when the same command is given again.",
    )
    parser.add_argument("base", metavar="BASE_DIR", help="folder of a checkpoint, sharded or a single file")
    parser.add_argument("adapters", metavar="ADAPTER_DIR", nargs="+", help="folders of adapters as PEFT saves them")
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help="new folder; appears when it is complete")
    parser.add_argument("--weights", metavar="W1,W2,…", help="a factor for each adapter's update (default: 1 each)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument("--verify", action="store_true", help="read the result back and compare before it appears")
    parser.add_argument("--allow-tied", action="store_true", help="merge into an embedding that is the output head too")
    parser.add_argument("--quiet", action="store_true", help="no progress, no summary")
    return parser


def main(argv=None) -> int:
    """Returns the exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    weights = None
    if args.weights is not None:
        try:
            weights = [float(w) for w in args.weights.split(",")]
        except ValueError:
            parser.error(f"--weights: expected numbers with commas between, got {args.weights!r}")
    try:
        summary = merge_checkpoint(
            args.base, args.adapters, args.out,
            weights=weights, dry_run=args.dry_run, verify=args.verify, allow_tied=args.allow_tied, quiet=args.quiet,
        )  # fmt: skip
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}\nwhat was written is kept: the same command continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped: the same command continues", file=sys.stderr)
        return 130
    if not args.quiet:
        _print_summary(summary, args)
    return 0


def _print_summary(summary, args):
    verb = "would be" if args.dry_run else "were"
    edited, total = summary["bytes_edited"] / 1e9, summary["bytes"] / 1e9
    print(
        f"{summary['tensors_edited']} of {summary['tensors']} tensors ({edited:.3f} of {total:.3f} GB) in "
        f"{summary['shards']} files {verb} merged into {summary['out']}"
    )
    if summary["files_left_out"]:
        print(f"not copied, as they hold other weights: {', '.join(summary['files_left_out'])}")
    if args.dry_run:
        print(
            f"disk: {summary['bytes'] / 1e9:.3f} GB needed, {summary['bytes_free'] / 1e9:.3f} GB free; nothing written"
        )
    elif args.verify:
        print("verified: untouched bytes identical, merged ones recomputed")
