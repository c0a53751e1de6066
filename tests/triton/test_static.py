"""Every production configuration of the Triton kernels, compiled ahead of time for sm_80, sm_90 and sm_100."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from lora_kernels.testing import static_gate

# In a process of its own: here the kernels may be defined for the interpreter.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    command = [sys.executable, "-m", "lora_kernels.testing.static_gate", "--write", str(folder)]
    run = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True)
    assert (folder / "triton.json").is_file(), run.stdout + run.stderr
    assert "| call | kernel |" in (folder / "triton.md").read_text()
    return json.loads((folder / "triton.json").read_text())["records"]


def test_every_kernel_compiles_cleanly(records):
    bad = [f"{r['case']}, {r['kernel']} on sm_{r['arch']}: {r['problems']}" for r in records if r["problems"]]
    assert not bad, "\n".join(bad)


def test_every_case_was_compiled_for_each_of_its_architectures(records):
    compiled = {(record["case"], record["arch"]) for record in records}
    assert compiled == {(case.name, arch) for case in static_gate.cases() for arch in case.archs}


_BAD_CASES = """
import dataclasses, functools, json, torch
from lora_kernels.ops.linear import triton, triton_cases
from lora_kernels.ops.linear.config import Config
from lora_kernels.ops.triton_host import StaticCase
from lora_kernels.testing import static_gate

x, weight, bias, a, b, s = triton_cases.arguments(512, 16, torch.bfloat16)
y = torch.empty((512, 4096), dtype=torch.bfloat16, device="meta")
def case(*tiles, **options):
    run = functools.partial(triton.run, y, x, weight, bias, a, b, s, None, Config(*tiles, **options))
    return StaticCase("bad", run, {"sum_splits_kernel": "mma", "one_pass_kernel": "wide"})
for bad in (
    case("one_pass", 128, 256, 128, 8, 5),
    case("one_pass", 128, 256, 64, 4, 3),
    case("one_pass", 16, 64, 64, 4, 2),
    case("decode", 512, 64, 64, 4, 2, split_k=2),
    case("one_pass", 128, 96, 64, 4, 2),
):
    print(json.dumps([p for record in static_gate.measure(bad, 90) for p in record.problems]))
"""


def test_the_gate_sees_what_is_bad():
    """Too much shared memory, spills, no wide instruction, no tensor cores at all, and what does not compile."""
    run = subprocess.run(
        [sys.executable, "-c", _BAD_CASES], env=_ENVIRONMENT, capture_output=True, text=True, check=True
    )
    shared, spilled, narrow, none, broken = (" ".join(json.loads(line)) for line in run.stdout.splitlines())
    assert "bytes of shared memory, the limit is 232448" in shared
    assert "bytes of spills" in spilled
    assert "no wgmma instruction" in narrow
    assert "no mma instruction" in none
    assert "power of 2" in broken or "Error" in broken
