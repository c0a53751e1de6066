"""Merging a checkpoint on disk against copying its files, interleaved, with the peak of memory.

    python bench/disk_merge.py --gigabytes 8 --dir FOLDER --json bench/results/disk_merge.json

Makes a bf16 checkpoint of random weights in Llama's layout (shards of 2 GB) and an adapter of rank 16 on all seven
projections of each layer. Both sides read from the page cache or the disk as they find it, write new files, and end
when every file is synced (fsync); the copy is `cp`, then fsync of each file. Dirty pages of the run before are
synced and the output is deleted outside the timing. The peak is VmHWM of a fresh process less its VmRSS when the
package and torch are loaded and one small merge was made.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import save_file

from lora_kernels.bench.bounds import bound, bound_line, finish

ROOT = pathlib.Path(__file__).resolve().parents[1]
HIDDEN, INNER, VOCAB, RANK = 4096, 14336, 32000, 16
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (1024, HIDDEN), "self_attn.v_proj": (1024, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
LAYER_BYTES = 2 * sum(rows * columns for rows, columns in PROJECTIONS.values())
# Runs in a fresh process: argv is base, adapter, out. A first, tiny merge loads all code and starts all threads.
CHILD = """
import json, sys, tempfile, time, pathlib, torch
from safetensors.torch import save_file
from lora_kernels.disk import merge_checkpoint
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    for name in "ba": (folder / name).mkdir()
    save_file({"q.weight": torch.zeros(256, 256, dtype=torch.bfloat16)}, folder / "b" / "model.safetensors")
    save_file({"q.lora_A.weight": torch.ones(16, 256), "q.lora_B.weight": torch.ones(256, 16)},
              folder / "a" / "adapter_model.safetensors")
    (folder / "a" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16}')
    merge_checkpoint(folder / "b", [folder / "a"], folder / "o", quiet=True)
before = status("VmRSS")
began = time.perf_counter()
summary = merge_checkpoint(sys.argv[1], [sys.argv[2]], sys.argv[3], quiet=True)
print(json.dumps({"seconds": time.perf_counter() - began, "growth": status("VmHWM") - before,
                  "largest": summary["largest_tensor_bytes"], "bytes": summary["bytes"]}))
"""


def make(folder, nbytes):
    """A checkpoint of about ``nbytes`` in ``folder/base`` and an adapter in ``folder/adapter``."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    # Random bytes of one layer, cut differently for each tensor: making 8 GB of normals would take minutes.
    pool = torch.randn(INNER * HIDDEN + VOCAB, dtype=torch.float32).mul_(0.02).bfloat16()
    layers = max(1, round((nbytes - 4 * VOCAB * HIDDEN) / LAYER_BYTES))
    shards, factors = [{}], {}

    def put(name, shape):
        start = len(name) * 97 % VOCAB
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        values = pool.repeat(1 + count // len(pool))[:count] if count > len(pool) - start else pool[start:][:count]
        if sum(t.nbytes for t in shards[-1].values()) + values.nbytes > 2e9:
            shards.append({})
        shards[-1][name] = values.reshape(shape).clone()
        flush(len(shards) - 1)

    def flush(upto):
        for i, shard in enumerate(shards[:upto]):
            if shard:
                written.update(dict.fromkeys(shard, file_name(i)))
                save_file(shard, base / file_name(i), metadata={"format": "pt"})
                shards[i] = {}

    def file_name(i):
        return f"model-{i + 1:05}.safetensors"

    written = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        put(name, (VOCAB, HIDDEN))
    for layer in range(layers):
        for name, (rows, columns) in PROJECTIONS.items():
            path = f"model.layers.{layer}.{name}"
            put(path + ".weight", (rows, columns))
            factors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
            factors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
    flush(len(shards))
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": written}))
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 32,
        "target_modules": [p.split(".")[1] for p in PROJECTIONS],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    os.sync()
    return base, adapter


def copy(base, out):
    """Seconds that ``cp`` takes, with an fsync of each file."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    for path in out.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - began


def merge(base, adapter, out):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(base), str(adapter), str(out)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dir", help="where to make the files (three times the size; deleted afterwards)")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    copies, merges = [], []
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        folder = pathlib.Path(folder)
        base, adapter = make(folder, args.gigabytes * 1e9)
        for _ in range(args.rounds):
            for run in (lambda: copies.append(copy(base, folder / "out")),
                        lambda: merges.append(merge(base, adapter, folder / "out"))):  # fmt: skip
                run()
                shutil.rmtree(folder / "out")
                os.sync()
            grown, largest = merges[-1]["growth"] / 1e6, merges[-1]["largest"] / 1e6
            print(f"cp {copies[-1]:.2f} s, merge {merges[-1]['seconds']:.2f} s", end=", ")
            print(f"memory +{grown:.0f} MB, largest tensor {largest:.0f} MB", flush=True)
    ratio = min(m["seconds"] for m in merges) / min(copies)
    growth = max(m["growth"] / m["largest"] for m in merges)
    case = f"{merges[0]['bytes'] / 1e9:.1f} GB bf16 checkpoint, rank 16 on 7 projections"
    targets = [
        bound(case, "merge on disk / cp, both synced", 1.5, ratio),
        bound(case, "peak memory growth / largest tensor", 3.0, growth),
    ]
    print(*map(bound_line, targets), sep="\n")
    return finish(targets, args.json, copy_seconds=copies, merges=merges)


if __name__ == "__main__":
    sys.exit(main())
