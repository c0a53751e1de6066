"""Of every Triton kernel the hardest launches compiled for sm_80, sm_90 and sm_100, `make static` all."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from lora_kernels.ops import triton_backend
from lora_kernels.testing import static_gate

# In a process of its own: here the kernels may be defined for the interpreter.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    command = [sys.executable, "-m", "lora_kernels.testing.static_gate", "--sample", "--write", str(folder)]
    run = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True)
    assert (folder / "triton.json").is_file(), run.stdout + run.stderr
    assert "| call | kernel |" in (folder / "triton.md").read_text()
    return json.loads((folder / "triton.json").read_text())["records"]


def test_every_kernel_compiles_cleanly(records):
    bad = [f"{r['case']}, {r['kernel']} on sm_{r['arch']}: {r['problems']}" for r in records if r["problems"]]
    assert not bad, "\n".join(bad)


def test_every_kernel_was_compiled_for_every_architecture(records):
    triton_backend.modules()
    modules = [part for name, part in sys.modules.items() if name.startswith("lora_kernels.ops.") and "triton" in name]
    kernels = {name for part in modules for name in vars(part) if name.endswith("_kernel")}
    assert len(kernels) > 15
    assert {(r["kernel"], r["arch"]) for r in records} == {(name, arch) for name in kernels for arch in (80, 90, 100)}


def test_what_compiles_but_can_not_be_launched_is_seen():
    flat = {"x": "tensordesc<bf16[64, 64]>", "ys": ("*bf16", "*bf16"), "rank": "i32"}
    assert not static_gate.launch_problems(flat)
    assert "x: a descriptor inside a tuple" in static_gate.launch_problems({**flat, "x": (flat["x"], "constexpr")})[0]


def test_tiles_of_64_rows_of_half_precision_hold_wgmma():
    half, single = {"x": "*bf16", "y": ("*fp32",)}, {"x": "*fp32"}
    with_it, without = {"wgmma": 4}, {"wgmma": 0}
    many, few = {"BLOCK_M": 64}, {"BLOCK_M": 32}
    problems = static_gate.wgmma_problems
    assert problems(half, many, without) == ["no wgmma instruction, and tiles of 64 rows"]
    assert not problems(half, many, with_it)
    assert not problems(half, few, without)
    assert not problems(single, many, without)


def test_a_table_of_other_sources_is_found_out(records, tmp_path):
    """A sample is not the whole table, and a record without its key is of unknown sources."""
    for record in records:
        record["key"] = ""
    (tmp_path / "triton.json").write_text(json.dumps({"records": records[:1]}))
    command = [sys.executable, "-m", "lora_kernels.testing.static_gate", "--check", str(tmp_path)]
    run = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "lora_linear bf16 M1 r16, decode_kernel on sm_80: not in the table" in run.stdout


_MASKS = """
import json
from lora_kernels.testing import static_gate
for case in static_gate.cases():
    if case.name.startswith("training"):
        found = static_gate.launches_of(case, 90).values()
        launches = [(src.fn.__name__, src.signature.get("mask"), values.get("HAS_MASK")) for src, _, values in found]
        print(json.dumps([case.name, launches]))
"""


def test_without_dropout_nothing_is_drawn_and_no_kernel_knows_of_a_mask():
    """The pointer is a constant None: no instruction of the compiled kernel can read it."""
    run = subprocess.run([sys.executable, "-c", _MASKS], env=_ENVIRONMENT, capture_output=True, text=True, check=True)
    cases = [json.loads(line) for line in run.stdout.splitlines()]
    assert len({"dropout" in name for name, _ in cases}) == 2
    for name, launches in cases:
        dropout = "dropout" in name
        assert ("draw_kernel" in [kernel for kernel, _, _ in launches]) is dropout
        masked = {kernel for kernel, mask, _ in launches if mask == "*u8"} - {"draw_kernel"}
        assert masked == ({"shrink_kernel", "skinny_kernel", "dx_kernel"} if dropout else set()), name
        for kernel, mask, has_mask in launches:
            if kernel != "draw_kernel":
                assert mask in (None, "constexpr", "*u8"), kernel
                assert has_mask in (None, mask == "*u8"), kernel


_ANY_ROWS = """
import collections, json, torch
from lora_kernels.ops.grouped import triton as grouped
from lora_kernels.ops.linear import triton_train_cases as training
from lora_kernels.testing import static_gate

found = collections.defaultdict(set)
sizes = {"features": 1024, "outputs": 1024}
for rows in range(80, 8200, 400):
    for case in (training._case("", rows, 16, torch.bfloat16, **sizes),
                 grouped._case("", rows, (16, 16, 16), torch.bfloat16, **sizes | {"outputs": (1024, 256, 256)})):
        for key, (src, *_) in static_gate.launches_of(case, 90).items():
            found[case.name[:8] + src.fn.__name__].add(key)
print(json.dumps({name: len(keys) for name, keys in found.items()}))
"""


def test_batches_of_other_sizes_compile_no_other_kernels():
    """A variant takes a second to compile: there are those of the tiles, not one for each number of rows."""
    command = [sys.executable, "-c", _ANY_ROWS]
    run = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True, check=True)
    variants = json.loads(run.stdout)
    assert len(variants) > 8
    assert {name: count for name, count in variants.items() if count > 4} == {}


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
