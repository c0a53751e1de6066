"""Peak memory, as the operating system counts it: native scratch shows here, which torch's profiler does not see."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")

SIZE = 4096  # weight of 64 MiB in float32
SETUP = rf"""
import re, torch, lora_kernels as lk
import torch.nn.functional as F
from lora_kernels import ops

torch.manual_seed(0)
torch.set_num_threads(2)
a, b, s = torch.randn(16, {SIZE}), torch.randn({SIZE}, 16), torch.tensor(0.5)

def peak():  # MiB; ru_maxrss would be the peak of the test process, which a child process takes over
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) / 1024

def small_calls(run, dtype=torch.float32):
    w, x = torch.randn(64, 64, dtype=dtype), torch.randn(8, 64, dtype=dtype)
    run(w, torch.randn(16, 64), torch.randn(64, 16), x)
"""
RUNS = {
    "merge_": "ops.merge_(w, a, b, s)",
    "merge_ safe": "ops.merge_(w, a, b, s, safe=True)",
    "unmerge_": "ops.unmerge_(w, a, b, s)",
    "switch_": "ops.switch_(w, (a, b, s), (a, b, 1.5))",
    "lora_linear": "ops.lora_linear(x, w, None, a, b, s)",
    "lora_linear, many rows": "ops.lora_linear(x.repeat(32, 1), w, None, a, b, s)",
    "multi_lora_linear": "ops.multi_lora_linear(x, w, None, [a], [b], torch.ones(1), ops.plan_batch([0] * len(x)))",
}


def run(code):
    result = subprocess.run([sys.executable, "-c", SETUP + code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_temporary_of_the_size_of_the_weight(name, dtype):
    grown = run(
        f"""
def call(w, a, b, x):
    {RUNS[name]}

small_calls(call, torch.{dtype})  # libraries and thread pools take their memory now
w, x = (torch.empty(n, {SIZE}, dtype=torch.{dtype}).normal_() for n in ({SIZE}, 8))
before = peak()
with torch.no_grad():
    call(w, a, b, x)
print(peak() - before)
"""
    )
    assert grown < 16


def test_a_temporary_would_be_seen():
    code = f"w = torch.randn({SIZE}, {SIZE}); before = peak(); w += b @ a; print(peak() - before)"
    assert run(code) > 60


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_peak_is_no_higher_than_pefts(dropout):
    pytest.importorskip("peft")
    step = f"""
import peft
from torch import nn

model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(2)])
config = dict(r=16, target_modules=["0", "1"], lora_dropout={dropout})
model = LIBRARY.get_peft_model(model, LIBRARY.LoraConfig(**config))
x = torch.randn(4096, 1024)
before = peak()
for _ in range(2):
    model(x).square().mean().backward()
print(peak() - before)
"""
    ours, theirs = run(step.replace("LIBRARY", "lk")), run(step.replace("LIBRARY", "peft"))
    assert ours <= theirs * 1.02, (ours, theirs)


def test_merge_and_unload_needs_the_model_and_one_layers_adapters():
    grown = run(
        f"""
from torch import nn

def wrapped(size):
    model = nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(4)])
    config = lk.LoraConfig(r=16, target_modules=[str(i) for i in range(4)], init_lora_weights=False)
    return lk.get_peft_model(model, config)

wrapped(64).merge_and_unload()
model = wrapped({SIZE})
before = peak()
model.merge_and_unload()
print(peak() - before)
"""
    )
    assert grown < 16
