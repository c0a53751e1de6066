"""Blocks side by side: in order, one error in its turn, memory of a few blocks, torch's threads as before."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from lora_kernels.disk.workers import Workers

CHILD = """
import sys, torch
from lora_kernels.disk import merge_checkpoint
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
def merge(kind):
    base, adapter, out = (f"{sys.argv[1]}/{kind}{name}" for name in ("base", "a", "out"))
    return merge_checkpoint(base, [adapter], out, quiet=True, verify=True)
merge("small_")  # loads all code
before = status("VmRSS")
summary = merge("")
print((status("VmHWM") - before) / summary["largest_tensor_bytes"])
"""


def test_in_order_whatever_ends_first():
    with Workers() as workers:
        states = set()

        def late(state, item):
            states.add(id(state))
            time.sleep(0.002 * (item % 3))
            return item, torch.get_num_threads(), threading.current_thread() is threading.main_thread()

        found = list(workers.run(late, range(40), list))
    assert found == [(item, 1, False) for item in range(40)]
    assert 1 <= len(states) <= workers.count


@pytest.mark.parametrize("error", [ValueError("seven"), KeyboardInterrupt()])
def test_an_error_comes_in_its_turn_and_stops_the_rest(error):
    threads, begun = torch.get_num_threads(), []

    def fails(_, item):
        begun.append(item)
        if item == 7:
            raise error
        return item

    through = []
    with pytest.raises(type(error)), Workers() as workers:
        through.extend(workers.run(fails, range(1000), list))
    assert through == list(range(7))
    assert len(begun) < 50
    assert torch.get_num_threads() == threads
    results = []
    thread = threading.Thread(target=lambda: results.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert results == [threads]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("experts", [None, 2])
def test_peak_memory(experts, tmp_path):
    """At most 3 times the largest tensor (64 MB); of a stack no expert is held whole either."""
    for kind, rows in (("", 16384), ("small_", 64)):
        base, adapter = tmp_path / f"{kind}base", tmp_path / f"{kind}a"
        base.mkdir()
        adapter.mkdir()
        if experts:
            tensors = {f"q.{n}": torch.zeros(experts, rows // experts, 2048, dtype=torch.bfloat16) for n in "qkv"}
            factors = {"q.lora_A.weight": torch.ones(16, 2048), "q.lora_B.weight": torch.ones(rows // experts, 16)}
        else:
            tensors = {f"{n}.weight": torch.zeros(rows, 2048, dtype=torch.bfloat16) for n in "qkv"}
            factors = {"q.lora_A.weight": torch.ones(8, 2048), "q.lora_B.weight": torch.ones(rows, 8)}
        save_file(tensors, base / "model.safetensors")
        save_file(factors, adapter / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 8, "target_parameters": ["q.q"] if experts else None}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}  # each has blocks of its own
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    assert float(run.stdout) <= (0.3 if experts else 3.0)
