"""The CUDA sources compiled for every architecture that is built: no spills, no local memory, full-width accesses."""

import json
import re
import sys

import pytest
from build_helpers import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import static_cuda

compiled = pytest.mark.skipif(static_cuda.unavailable() is not None, reason=f"{static_cuda.unavailable()}")
WRITTEN = ROOT / "bench" / "results" / "static" / "cuda.json"


@pytest.fixture(scope="module")
def records():
    return static_cuda.measure_all()


@compiled
def test_every_kernel_compiles_cleanly(records):
    bad = [f"{r['kernel']} of {r['source']} on sm_{r['arch']}: {r['problems']}" for r in records if r["problems"]]
    assert not bad, "\n".join(bad)


@compiled
def test_every_source_was_compiled_for_every_architecture(records):
    measured = {(record["source"], record["arch"]) for record in records}
    assert measured == {(path.name, arch) for path in static_cuda.sources() for arch in static_cuda.archs(path)}


@compiled
def test_the_merge_reads_and_writes_its_four_strips_sixteen_bytes_at_a_time(records):
    for record in (r for r in records if r["kernel"].startswith("merge_kernel<")):
        width, checks, *_ = record["kernel"].removeprefix("merge_kernel<").rstrip(">").split(", ")
        strips = 8 if width == "float" else 4
        assert record["counts"]["global_load_16"] >= strips, record
        assert record["counts"]["global_store_16"] == (0 if checks == "true" else strips), record


@compiled
def test_the_linear_kernels_use_tensor_cores_and_asynchronous_copies(records):
    sources = ("linear_bf16_sm80", "linear_f16_sm80", "decode_", "gradient_")
    found = [r for r in records if r["source"].startswith(sources)]
    assert {r["kernel"].split("<")[0] for r in found} == {
        "linear_kernel",
        "shrink_kernel",
        "decode_kernel",
        "gradient_kernel",
    }
    for record in found:
        # A step of 32: two of 16, each with the products of a warp's 16 x 8 pieces. Several slots have it twice.
        sizes = re.search(r"GemmTile<\w+, (\d+), (\d+), (\d+), (\d+), (?:false|true), \d+>(, true)?", record["kernel"])
        twice = sizes[5] and not record["kernel"].startswith("decode_")
        rows, cols, high, wide = map(int, sizes.groups()[:4])
        products = 2 * (rows // high // 16) * (cols // wide // 8) * (2 if twice else 1)
        assert record["counts"]["mma"] >= products, record
        assert record["counts"]["ldmatrix"] > 0, record
        assert record["counts"]["async_copy"] > 0, record
        # Beside 48 KiB that the launch asks for there is room for nothing else.
        assert record["shared"] == 0 or rows < 128, record


@compiled
def test_the_kernel_for_few_rows_streams_the_weight(records):
    """Four blocks a multiprocessor, three with 64 tokens; what they read once is the first to leave L2."""
    found = [r for r in records if r["source"] == "decode_sm80.cu"]
    assert len(found) == 12 * len(static_cuda.ARCHS)
    for record in found:
        assert record["registers"] <= (168 if ", 64, 64, " in record["kernel"] else 128), record
        assert record["counts"]["stream"] > 0, record


@compiled
def test_the_kernels_of_sm_90a_use_its_units(records):
    """Four products of a warpgroup a step, of the width of the tile, and the update's; copies of three operands."""
    found = [r for r in records if r["source"].endswith("_sm90.cu")]
    assert len(found) == 10
    for record in found:
        assert record["arch"] == "90a"
        assert record["counts"]["wgmma"] >= 5, record
        assert record["counts"]["tma"] >= 3, record
        assert record["counts"]["mma"] == 0, record
        assert record["counts"]["global_store_16"] >= 8, record
        assert record["registers"] == 168, record  # three warpgroups share 65,536


@compiled
def test_serialised_products_are_found(tmp_path):
    """More sums than there are registers."""
    source = tmp_path / "narrow_sm90.cu"
    text = (ROOT / "csrc" / "cuda" / "linear_bf16_sm90.cu").read_text()
    wide = (ROOT / "csrc" / "cuda" / "linear_sm90.h").read_text().replace("<200>", "<120>")
    (tmp_path / "wide.h").write_text(wide.replace('#include "consume', f'#include "{ROOT}/csrc/cuda/consume'))
    source.write_text(text.replace('"linear_sm90.h"', '"wide.h"'))
    problems = {problem for record in static_cuda.measure(source, "90a") for problem in record["problems"]}
    assert any(problem.startswith("wgmma serialised") for problem in problems), problems


def test_the_written_table_names_the_kernels_of_today():
    written = json.loads(WRITTEN.read_text())["records"]
    assert {record["source"] for record in written} == {path.name for path in static_cuda.sources()}
    assert not [record for record in written if record["problems"]]


@compiled
def test_a_kernel_that_spills_is_found(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(
        'extern "C" __global__ void spills(float* p, const int* at) {\n'
        "  float v[64];\n"
        "  for (int i = 0; i < 64; ++i) v[i] = p[i * 32];\n"
        "  for (int i = 0; i < 64; ++i) v[at[i] & 63] += p[i];\n"
        "  p[threadIdx.x] = v[at[threadIdx.x] & 63];\n"
        "}\n"
    )
    (record,) = static_cuda.measure(source, "80")
    assert record["kernel"] == "spills"
    assert record["stack"] >= 256
    assert record["counts"]["local"] > 0
    assert len(record["problems"]) == 2


@compiled
def test_a_source_that_does_not_compile_is_an_error(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { nothing(); }\n")
    with pytest.raises(RuntimeError, match="nothing"):
        static_cuda.measure(source, "80")


def test_the_architectures_are_those_of_the_build():
    assert f"foreach(arch {' '.join(static_cuda.ARCHS)})" in (ROOT / "cmake" / "cuda.cmake").read_text()


def test_it_says_why_it_cannot_compile(monkeypatch):
    monkeypatch.setattr(static_cuda.toolchain, "find_nvcc", lambda: None)
    assert static_cuda.unavailable() == "no nvcc"
