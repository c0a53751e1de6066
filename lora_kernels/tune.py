"""`python -m lora_kernels tune`: measures tile configurations of the Triton kernels on the GPU at hand.

Writes the fastest for each shape to a file that ``ops/linear/config.py`` reads from then on. CUDA graphs, weights
rotated over copies larger than the L2 cache.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import torch

from .ops import triton_backend
from .ops.linear import config

SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))  # K, N
TOKENS = (1, 16, 64, 128, 512, 2048, 8192)
RANKS = (16, 64)


def candidates(num_tokens, in_features, out_features, rank, capability, num_sms):
    """Configurations worth measuring; the one of the rules comes first. Pure."""
    found = [config.choose(num_tokens, in_features, out_features, rank, 2, capability, num_sms=num_sms)]
    wide = capability >= (9, 0)
    if num_tokens <= 64 and rank <= 64:
        block_m = 16 if num_tokens <= 16 else 32 if num_tokens <= 32 else 64
        for block_n, block_k, stages, split in itertools.product((32, 64, 128), (64, 128), (3, 4), (1, 2, 4, 8)):
            if in_features // split >= 512 and -(-out_features // block_n) * split <= 4 * num_sms:
                found.append(config.Config("decode", block_m, block_n, block_k, 4, stages, split_k=split))
    if num_tokens <= 1024 and rank <= 64:
        for block_m, block_n in ((16, 64), (32, 64), (64, 64), (64, 128), (128, 128)):
            if block_m <= max(16, num_tokens):
                found.append(config.Config("one_pass", block_m, block_n, 64 if wide else 32, 4, 3))
    if num_tokens > 16:
        for (block_m, block_n), stages in itertools.product(((64, 128), (128, 128), (128, 256)), (3, 4)):
            if block_m <= num_tokens:
                warps = 8 if block_m * block_n > 64 * 128 else 4
                blocks = (block_m, block_n, 64 if wide else 32, warps, stages)
                found.append(config.Config("two_pass", *blocks, tma=wide))
    return list(dict.fromkeys(found))


def problem():
    """Why nothing can be tuned here; None when it can."""
    if triton_backend.interpreted():
        return "TRITON_INTERPRET is set: the interpreter's times mean nothing"
    return triton_backend.problem()


def main(argv=None):
    parser = argparse.ArgumentParser(prog="lora_kernels tune", description="measure Triton tiles on the GPU at hand")
    parser.add_argument("--shape", nargs="+", metavar="KxN", help="in_features x out_features; default: Llama 3 8B's")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="M")
    parser.add_argument("--rank", nargs="+", type=int, default=RANKS)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each shape, compiling aside")
    parser.add_argument("--out", type=Path, help="file to write; default: the one that the package reads for this GPU")
    args = parser.parse_args(argv)
    shapes = [_shape(parser, text) for text in args.shape] if args.shape else SHAPES
    if min((*args.tokens, *args.rank)) < 1 or args.seconds <= 0:
        parser.error("--tokens, --rank, --seconds: expected numbers above 0")
    reason = problem()
    if reason is not None:
        print(f"lora_kernels tune: needs a GPU on which the Triton kernels run: {reason}", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name()
    path = args.out or config.file_of(gpu)
    found = json.loads(path.read_text())["configs"] if path.is_file() else {}
    for (in_features, out_features), tokens, rank in itertools.product(shapes, args.tokens, args.rank):
        sizes = (tokens, in_features, out_features, rank)
        best, seconds, by_rule = _fastest(sizes, getattr(torch, args.dtype), args.seconds)
        found[config.key(*sizes, 2)] = dataclasses.asdict(best)
        print(f"M={tokens:<6} K={in_features:<6} N={out_features:<6} r={rank:<4} {seconds * 1e6:9.1f} us "
              f"({by_rule / seconds:.2f} x the rule's speed)  {best}", flush=True)  # fmt: skip
        _write(path, gpu, found)
    print(f"wrote {path}")
    return 0


def _shape(parser, text):
    try:
        in_features, out_features = (int(part) for part in text.lower().split("x"))
    except ValueError:
        parser.error(f"--shape: expected KxN, such as 4096x1024, got {text!r}")
    return in_features, out_features


def _write(path, gpu, found):
    """Whole or not at all: an interrupted run leaves the shapes measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"gpu": gpu, "configs": dict(sorted(found.items()))}, indent=1) + "\n")
    partial.replace(path)


def _fastest(sizes, dtype, seconds):
    """(Config, seconds a call, seconds a call of the rule's Config)."""
    from .bench.cuda_timing import interleaved
    from .ops import triton_host
    from .ops.linear import triton

    num_tokens, in_features, out_features, rank = sizes
    normal = torch.randn(max(num_tokens, rank, 1), in_features, device="cuda", dtype=dtype)
    x, lora_a = normal[:num_tokens].clone(), normal[:rank].clone()
    count = max(2, -(-(96 << 20) // (in_features * out_features * 2)))
    weights = [torch.randn(out_features, in_features, device="cuda", dtype=dtype) for _ in range(min(count, 16))]
    lora_b = torch.randn(out_features, rank, device="cuda", dtype=dtype)
    scaling, y = torch.ones((), device="cuda"), torch.empty(num_tokens, out_features, device="cuda", dtype=dtype)
    turn = itertools.cycle(weights)

    def runner(tiles):
        return lambda: triton.run(y, x, next(turn), None, lora_a, lora_b, scaling, None, tiles)

    runs = {}
    for tiles in candidates(*sizes, triton_host.capability(x), triton_host.num_sms(x)):
        try:
            runner(tiles)()
            torch.cuda.synchronize()
        except Exception as error:  # too much shared memory and the like: not a candidate on this GPU
            print(f"    {tiles}: {type(error).__name__}", file=sys.stderr)
            continue
        runs[tiles] = runner(tiles)
    times = interleaved(runs, len(weights), seconds=seconds)
    best = min(times, key=times.get)
    return best, times[best], next(iter(times.values()))


if __name__ == "__main__":
    sys.exit(main())
