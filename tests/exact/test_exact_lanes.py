"""The exact merge with the 16 lanes of AVX-512, its instructions emulated (csrc/emulate/avx512.h), in every run of the
tests: golden vectors, and the native bits and bytes at every magnitude. ``make avx512`` runs all of it that way."""

import ctypes
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from exact_cases import BF16, F16, F32, GOLDEN, problem, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from build_support import toolchain
from lora_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
DTYPES = [F32, F16, BF16]  # in the order of DType
OPTIONS = ["-std=c++17", "-O1", "-ffp-contract=fast", "-fPIC", f"-I{CSRC / 'include'}", "-DLK_HAVE_AVX2=1"]
WIDE = ["-mavx2", "-mfma", "-mf16c", "-include", CSRC / "emulate" / "avx512.h", "-DLK_ISA=avx2"]  # chosen as AVX2 is
OBJECTS = {
    "portable": ("cpu/exact_isa.cpp", ["-DLK_ISA=portable"]),
    "wide": ("cpu/exact_isa.cpp", WIDE),
    "exact": ("cpu/exact.cpp", []),
    "isa": ("cpu/isa.cpp", []),
    "exports": ("emulate/exact_exports.cpp", []),
}


class Problem(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "a", "b")]
    _fields_ += [(name, ctypes.c_int64) for name in ("rows", "cols", "rank")]
    _fields_ += [("dtype", ctypes.c_int), ("scale", ctypes.c_float)]


@pytest.fixture(scope="module")
def library():
    compiler = toolchain.find_cxx()
    if compiler is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs a C++ compiler and a CPU with AVX2")
    digest = hashlib.sha256(f"{compiler} {OPTIONS} {OBJECTS}".encode())
    for path in sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp")):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "lanes"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{digest.hexdigest()[:16]}.so"
    if not made.is_file():
        compile_all(compiler, folder, made)
    loaded = ctypes.CDLL(str(made))
    loaded.lk_merge.restype = ctypes.c_int64
    return loaded


def compile_all(compiler, folder, made):
    """Under names of this process, then renamed: other workers may be at it."""
    here = f"{os.getpid()}"

    def compiled(name):
        source, options = OBJECTS[name]
        target = folder / f"{here}-{name}.o"
        subprocess.run([compiler, *OPTIONS, *options, "-c", CSRC / source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, OBJECTS))
    fresh = folder / f"{here}.so"
    subprocess.run([compiler, "-shared", *objects, "-o", fresh], check=True)
    for path in (*objects, *folder.glob("*.so")):
        if path != fresh:
            path.unlink(missing_ok=True)
    fresh.replace(made)


def there_and_back(library, weight, a, b, scale):
    """(merged, body) and the weight that came back; None where it is refused, which changes nothing."""
    a, b, merged = a.float().contiguous(), b.float().contiguous(), weight.clone()
    case = Problem(
        merged.data_ptr(), a.data_ptr(), b.data_ptr(), *weight.shape, len(a), DTYPES.index(weight.dtype), float(scale)
    )
    where = ctypes.c_void_p()
    size = library.lk_merge(ctypes.byref(case), ctypes.byref(where))
    if size < 0:
        assert same_bits(merged, weight)
        return None
    body = torch.tensor(list(ctypes.string_at(where, size)), dtype=torch.uint8)
    result = merged.clone(), body
    assert library.lk_unmerge(ctypes.byref(case), ctypes.c_void_p(body.data_ptr()), ctypes.c_int64(size)) == 0
    assert same_bits(merged, weight)
    return result


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, library):
    case = load_file(path)
    merged, body = there_and_back(library, case["weight"], case["lora_a"], case["lora_b"], case["scaling"])
    assert same_bits(merged, case["merged"])
    assert torch.equal(body, case["body"])


SIZES = st.one_of(st.sampled_from(["wild", "steps", "zeros"]), st.integers(-140, 60).map(lambda power: 2.0**power))


@pytest.mark.skipif(not _native.cpu_available, reason=_native.cpu_reason)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(1, 1), (3, 50), (13, 300), (40, 70), (7, 2100), (1, 4095)]),
    rank=st.integers(1, 9),
    size=SIZES,
    update=st.one_of(SIZES, st.integers(-30, 12)),
    seed=st.integers(0, 2**20),
)
def test_bits_and_bytes_are_the_native_ones_at_every_magnitude(library, dtype, shape, rank, size, update, seed):
    """An integer `update` is the power of two of the update's size beside that of the weights."""
    if isinstance(update, int):
        update = 2.0**update * (size if isinstance(size, float) else 1.0)
    weight, a, b, scale = problem(*shape, rank, dtype, w=size, a=1.0, b=update, seed=seed)
    theirs = weight.clone()
    body, status = torch.ops.lora_kernels.merge_exact_(theirs, a, b, torch.tensor(scale))
    ours = there_and_back(library, weight, a, b, torch.tensor(scale))
    assert (ours is None) == (status[0].item() != 0)
    if ours is not None:
        assert same_bits(ours[0], theirs)
        assert torch.equal(ours[1], body)
