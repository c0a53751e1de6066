"""Run as a program: merges in child processes that are killed at random moments, round after round.

Arguments: base, adapter, out, wanted (what an undisturbed merge gives), seed, kills. A round lasts until a child gets
to its end; ``out`` must be ``wanted`` then, and whenever it is there. Prints how many children were killed and how
many of them left something to continue from. Nothing is computed in this process before it forks, so no child
misses the threads of a pool.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from lora_kernels.disk import merge_checkpoint


def start(base, adapter, out):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        merge_checkpoint(base, [adapter], out, verify=True, quiet=True, block_bytes=512, sync_bytes=3000)
        status = 0
    finally:
        os._exit(status)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def main(base, adapter, out, wanted, seed, kills):
    torch.set_num_threads(1)
    generator = random.Random(int(seed))
    journal = Path(out + ".partial.jsonl")
    wanted = contents(wanted)
    began = time.monotonic()
    assert os.waitpid(start(base, adapter, out), 0)[1] == 0
    duration = time.monotonic() - began
    shutil.rmtree(out)
    killed = continued = in_round = 0
    while killed < int(kills) or continued < 3:  # when a kill strikes is the clock's
        child = start(base, adapter, out)
        time.sleep(generator.uniform(0.0, 0.5 + 0.1 * in_round) * duration)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a merge failed"
        if os.WIFSIGNALED(status):
            killed, in_round = killed + 1, in_round + 1
            continued += journal.exists() and journal.read_bytes().count(b"\n") > 1
        if os.path.exists(out):
            assert contents(out) == wanted, "the output appeared before it was complete"
            journal.unlink(missing_ok=True)  # killed after the rename: only this was left to do
            shutil.rmtree(out)
            in_round = 0
    print(json.dumps({"killed": killed, "continued": continued}))


if __name__ == "__main__":
    main(*sys.argv[1:])
