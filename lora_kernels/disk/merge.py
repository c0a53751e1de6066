"""``merge_checkpoint``: the whole job, from two folders to a third, or to an error and no change."""

import os
import shutil

import torch

from ..io.checkpoint import CheckpointError
from .adapter import fingerprint, read_adapter
from .base import open_base
from .journal import Journal, sync_folder
from .plan import make_plan
from .progress import Progress
from .stream import BLOCK_BYTES, SYNC_BYTES, ShardWriter
from .verify import verify_checkpoint
from .workers import Workers

FORMAT = 1


def merge_checkpoint(
    base_dir, adapter_dirs, out, *, weights=None, dry_run=False, verify=False, allow_tied=False, quiet=False,
    block_bytes=BLOCK_BYTES, sync_bytes=SYNC_BYTES,
):  # fmt: skip
    """Writes to ``out`` the checkpoint in ``base_dir`` with adapters merged: W + Σ weight · ΔW, rounded once.

    Dtypes, shards, offsets, metadata, index and all other files stay as they are. ``out`` appears, complete, at the
    end; until then there are ``out.partial`` and its journal, from which the same call continues. Besides the adapters,
    memory holds a few blocks of rows; of a weight that PiSSA or OLoRA started from also its decomposition in float32.

    Args:
        base_dir: folder of a safetensors checkpoint, sharded or not.
        adapter_dirs: folders of LoRA adapters as PEFT saves them.
        out: folder that is not there, or is empty.
        weights: a factor for each adapter's update, 1 by default. Tensors saved in full (modules_to_save, bias)
            replace the base's whatever the weight; a DoRA adapter's is that of ``W' − W``.
        dry_run: check everything and write nothing.
        verify: read the result back before it becomes ``out``.
        allow_tied: merge into an embedding that is the output head too.
        block_bytes, sync_bytes: how much is edited at a time, and lies between two points to continue from.

    Returns:
        A dict: what was, or would be, written.

    Raises:
        CheckpointError: the inputs can not be read or do not fit; nothing was written.
        OSError: the disk; what was written is kept, and the same call continues.
    """
    out = os.path.realpath(os.fspath(out))  # a link can not be renamed over
    adapter_dirs = [os.fspath(directory) for directory in adapter_dirs]
    weights = _check_weights(weights, adapter_dirs)
    _check_out(base_dir, adapter_dirs, out)
    base = open_base(base_dir)
    adapters = [read_adapter(directory, weight) for directory, weight in zip(adapter_dirs, weights)]
    edits = make_plan(base, adapters, allow_tied)
    folder = out + ".partial"
    summary = _summary(base, edits, out)
    _check_space(folder, summary)
    if dry_run:
        return summary
    os.makedirs(os.path.dirname(out), exist_ok=True)
    journal = Journal(folder, _job(base, adapters, allow_tied, block_bytes))
    try:
        if not journal.finished:
            _check_out(base_dir, adapter_dirs, out)  # again: another merge may have made it until this one had the lock
            with Workers() as workers:
                _write(workers, base, edits, journal, quiet, block_bytes, sync_bytes)
                if verify:
                    _verify(workers, base, edits, folder, quiet, block_bytes)
        journal.finish(out)
    except CheckpointError:
        journal.discard()
        raise
    finally:
        journal.close()
    return summary


def _check_weights(weights, adapter_dirs):
    if not adapter_dirs:
        raise CheckpointError("ADAPTER_DIR: expected at least one adapter")
    weights = [1.0] * len(adapter_dirs) if weights is None else [float(w) for w in weights]
    if len(weights) != len(adapter_dirs):
        raise CheckpointError(f"weights: expected one for each of {len(adapter_dirs)} adapters, got {len(weights)}")
    for weight in weights:
        if weight == 0 or weight - weight != 0:
            raise CheckpointError(f"weights: expected finite numbers other than 0, got {weight}")
    return weights


def _check_out(base_dir, adapter_dirs, out):
    real = os.path.realpath(out)
    for directory in (base_dir, *adapter_dirs):
        other = os.path.realpath(os.fspath(directory))
        if real == other or real.startswith(other + os.sep):
            raise CheckpointError(f"OUT: {out} is, or lies in, {directory}; choose a folder of its own")
    if os.path.exists(out) and not os.path.isdir(out):
        raise CheckpointError(f"OUT: {out} is a file")
    if os.path.ismount(out):
        raise CheckpointError(f"OUT: {out} is a mount point; choose a folder in it")
    unfinished = os.path.exists(out + ".partial.jsonl") and not os.path.exists(out + ".partial")
    if os.path.isdir(out) and os.listdir(out) and not unfinished:
        raise CheckpointError(f"OUT: {out} is not empty; delete it or choose another")


def _summary(base, edits, out):
    infos = [base.tensors[name] for name in edits]
    return {
        "out": out,
        "shards": len(base.shards),
        "tensors": len(base.tensors),
        "tensors_edited": len(edits),
        "bytes_edited": sum(info.nbytes for info in infos),
        "bytes": sum(base.shards.values()) + base.sidecar_bytes,
        "largest_tensor_bytes": max((info.nbytes for info in base.tensors.values()), default=0),
        "files_copied": base.sidecars,
        "files_left_out": base.left_out,
    }


def _check_space(folder, summary):
    parent = os.path.dirname(folder)
    while not os.path.isdir(parent):
        if os.path.lexists(parent):
            raise CheckpointError(f"OUT: {parent} is no folder")
        parent = os.path.dirname(parent)
    there = sum(os.path.getsize(os.path.join(at, f)) for at, _, files in os.walk(folder) for f in files)
    free, needed = shutil.disk_usage(parent).free, max(0, summary["bytes"] - there)
    summary["bytes_free"] = free
    if free < needed:
        raise CheckpointError(f"OUT: {needed:,} bytes are needed on the disk of {parent}, {free:,} are free")


def _job(base, adapters, allow_tied, block_bytes):
    """What must be the same for an unfinished merge to be continued."""
    shards = {name: [size, os.stat(base.path(name)).st_mtime_ns] for name, size in base.shards.items()}
    # The bits of a decomposition depend on the number of threads.
    threads = torch.get_num_threads() if any(adapter.start for adapter in adapters) else None
    adapters = [[os.path.realpath(a.directory), fingerprint(a.directory), a.weight] for a in adapters]
    return {
        "format": FORMAT,
        "base": os.path.realpath(base.directory),
        "shards": shards,
        "adapters": adapters,
        "allow_tied": allow_tied,
        "tied": base.tied,
        "model_types": list(base.model_types),
        "block_bytes": block_bytes,
        "threads": threads,
    }


def _write(workers, base, edits, journal, quiet, block_bytes, sync_bytes):
    done = sum(min(journal.done.get(name, 0), size) for name, size in base.shards.items())
    progress = Progress("merge", sum(base.shards.values()), done, quiet=quiet)
    for shard, size in base.shards.items():
        path = os.path.join(journal.folder, shard)
        if journal.done.get(shard) != size or not os.path.isfile(path) or os.path.getsize(path) != size:
            ShardWriter(workers, base, shard, edits, journal, progress, block_bytes, sync_bytes).write()
    folders = {journal.folder}
    for name in base.sidecars:
        target = os.path.join(journal.folder, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        folders.add(os.path.dirname(target))
        shutil.copyfile(base.path(name), target)
        sync_folder(target)  # a file is synced as a folder is
    for folder in folders:
        sync_folder(folder)
    progress.close()


def _verify(workers, base, edits, folder, quiet, block_bytes):
    progress = Progress("verify", sum(base.shards.values()), quiet=quiet)
    verify_checkpoint(workers, base, edits, folder, progress, block_bytes)
    progress.close()
