"""The build itself: repeated, interrupted by vanished tools, restricted, broken."""

import json
import re
import shutil
import sys
import time

import pytest
from build_helpers import ROOT, build_in_place, run


def build_folder(checkout):
    (folder,) = (checkout / "build").glob("cp*-torch*")
    return folder


def objects(checkout):
    return {path.name.partition(".")[0] for path in (checkout / "lora_kernels").glob("*.so")}


def test_the_second_build_does_nothing(built_checkout):
    build_in_place(built_checkout, LORA_KERNELS_BUILD="cpu")
    made = {path: path.stat().st_mtime_ns for path in build_folder(built_checkout).glob("*.so")}
    start = time.monotonic()
    output = build_in_place(built_checkout, LORA_KERNELS_BUILD="cpu")
    assert time.monotonic() - start < 20
    assert "no work to do" in output
    assert "Building" not in output
    assert "configuring" not in output
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_the_build_folder_is_keyed_by_python_and_torch(built_checkout):
    import torch

    expected = f"cp{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"
    assert build_folder(built_checkout).name == expected


def test_a_changed_source_is_compiled_again_and_only_that(built_checkout):
    source = built_checkout / "csrc" / "bind" / "ops_info.cpp"
    source.write_text(source.read_text() + "\n")
    output = build_in_place(built_checkout, LORA_KERNELS_BUILD="cpu")
    assert re.findall(r"Building CXX object \S*/(\w+)\.cpp", output) == ["ops_info"]


def test_a_build_tool_that_vanished_is_replaced(built_checkout, tmp_path):
    sys.path.insert(0, str(ROOT))
    from build_support import toolchain

    cache = build_folder(built_checkout) / "CMakeCache.txt"
    gone = tmp_path / "ninja"
    shutil.copy(toolchain.find_tool("ninja"), gone)
    cache.write_text(re.sub(r"(CMAKE_MAKE_PROGRAM:\w+)=.*", rf"\1={gone}", cache.read_text()))
    gone.unlink()
    build_in_place(built_checkout, LORA_KERNELS_BUILD="cpu")
    assert str(gone) not in cache.read_text()
    assert {"_C", "_ops_cpu"} <= objects(built_checkout)


def test_a_moved_checkout_is_built_again(built_checkout, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(built_checkout, moved)
    output = build_in_place(moved, LORA_KERNELS_BUILD="cpu")
    assert "configuring" in output
    assert str(built_checkout) not in (build_folder(moved) / "CMakeCache.txt").read_text()


def test_cpu_mode_builds_no_cuda_and_removes_an_older_one(built_checkout):
    left_over = built_checkout / "lora_kernels" / "_ops_cuda.so"
    left_over.write_bytes(b"of an earlier build")
    build_in_place(built_checkout, LORA_KERNELS_BUILD="cpu")
    assert objects(built_checkout) == {"_C", "_ops_cpu"}
    report = json.loads((built_checkout / "lora_kernels" / "_build.json").read_text())
    assert report["objects"] == ["_C", "_ops_cpu"]
    assert report["notes"] == ["CUDA kernels not built: LORA_KERNELS_BUILD=cpu"]


def test_without_python_headers_the_ops_are_built_all_the_same(fresh_checkout):
    code = (
        "from pathlib import Path; from build_support import native, toolchain; "
        "toolchain.find_python_include = lambda: None; "
        "r = native.build(Path.cwd()); print(sorted(r.objects), r.notes)"
    )
    output = run(sys.executable, "-c", code, cwd=fresh_checkout, LORA_KERNELS_BUILD="cpu")
    assert "['_ops_cpu']" in output
    assert "no Python.h" in output


def test_without_torch_the_module_is_built_and_the_missing_ops_are_announced(fresh_checkout):
    code = (
        "from pathlib import Path; from build_support import native, toolchain; "
        "toolchain.find_torch = lambda: None; "
        "r = native.build(Path.cwd()); print(sorted(r.objects), r.notes)"
    )
    output = run(sys.executable, "-c", code, cwd=fresh_checkout)
    assert "['_C']" in output
    assert "Install torch first" in output
    assert "reference backend only" in output


def test_torch_is_found_when_build_isolation_hides_it(tools):
    code = f"import sys; sys.path = [p for p in sys.path if 'site-packages' not in p] + [{str(ROOT)!r}]; "
    code += "from build_support import toolchain; print(toolchain.find_torch().root)"
    import torch

    found = run(sys.executable, "-c", code, cwd="/").strip()
    assert torch.__file__.startswith(found)


def test_the_search_for_torch_can_be_overruled(tools, tmp_path):
    code = f"import sys; sys.path.append({str(ROOT)!r}); "
    code += "from build_support import toolchain; print(toolchain.find_torch())"
    assert run(sys.executable, "-c", code, cwd="/", LORA_KERNELS_TORCH_DIR=str(tmp_path)).strip() == "None"


def test_sources_that_do_not_compile_stop_the_build(fresh_checkout):
    (fresh_checkout / "csrc" / "bind" / "ops_info.cpp").write_text("this is not C++\n")
    output = build_in_place(fresh_checkout, ok=False, LORA_KERNELS_BUILD="auto", CUDACXX="/nonexistent/nvcc")
    assert "LORA_KERNELS_BUILD=none" in output


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_an_explicit_mode_is_held_to_its_word(fresh_checkout, mode):
    broken = {"CXX": "/bin/false", "CC": "/bin/false", "CUDACXX": "/nonexistent/nvcc"}
    output = build_in_place(fresh_checkout, ok=False, LORA_KERNELS_BUILD=mode, **broken)
    assert f"LORA_KERNELS_BUILD={mode}, but there is no" in output


def test_an_unknown_mode_is_named(fresh_checkout):
    output = build_in_place(fresh_checkout, ok=False, LORA_KERNELS_BUILD="gpu")
    assert "LORA_KERNELS_BUILD: expected one of auto, cpu, cuda, none, got 'gpu'" in output
