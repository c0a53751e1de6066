"""Index maps of the tensor-core kernels, their tile choice, and the emulator itself: does it find what is wrong?"""

import ctypes

import numpy as np
import pytest

from lora_kernels import _native


@pytest.fixture(scope="module")
def lanes(library):
    out = np.empty((32, 10), np.int32)
    library.lk_maps(out.ctypes.data_as(ctypes.c_void_p))
    return out


def test_accumulators_cover_the_product_once(lanes):
    cells = [(row, col + i) for lane in lanes for row, col in (lane[:2], (lane[2], lane[3] - 1)) for i in range(2)]
    assert sorted(cells) == [(row, col) for row in range(16) for col in range(8)]


@pytest.mark.parametrize("operand", [4, 6, 8], ids=["left", "right", "turned"])
def test_lanes_name_every_row_and_run_once(lanes, operand):
    named = [tuple(lane[operand : operand + 2]) for lane in lanes]
    assert sorted(named) == [(row, run) for row in range(16) for run in range(2)]


def test_matrices_come_in_the_order_of_the_fragments(lanes):
    """Matrix m of ldmatrix is lanes 8 m to 8 m + 7: PTX's a0 to a3, and b0, b1 of two products."""
    first = lanes[::8]
    assert [tuple(lane[4:6]) for lane in first] == [(0, 0), (8, 0), (0, 1), (8, 1)]
    assert [tuple(lane[6:8]) for lane in first] == [(0, 0), (0, 1), (8, 0), (8, 1)]
    assert [tuple(lane[8:10]) for lane in first] == [(0, 0), (8, 0), (0, 1), (8, 1)]


@pytest.mark.parametrize("runs", [4, 8, 16])
def test_swizzle_is_a_permutation_without_bank_conflicts(library, runs):
    offsets = np.array([[library.lk_tile_offset(runs, row, run) for run in range(runs)] for row in range(64)])
    assert sorted(offsets.flatten()) == list(range(0, 64 * runs * 16, 16))
    for row in range(0, 64, 8):
        for run in range(runs):
            assert len(set(offsets[row : row + 8, run] // 16 % 8)) == 8


@pytest.mark.parametrize("sums", [32, 64, 128])
def test_the_sums_of_a_warpgroup_cover_the_product_once(library, sums):
    out = np.empty((128, sums, 2), np.int32)
    library.lk_sum_maps(sums, out.ctypes.data_as(ctypes.c_void_p))
    assert sorted(map(tuple, out.reshape(-1, 2))) == [(row, col) for row in range(64) for col in range(2 * sums)]
    # Lanes of four have a row's neighbouring columns: what `trade` relies on.
    assert [tuple(out[lane, 0]) for lane in range(4)] == [(0, 0), (0, 2), (0, 4), (0, 6)]
    assert tuple(out[0, 4]) == (0, 8)
    assert tuple(out[0, 2]) == (8, 0)


def test_descriptors_are_as_the_ptx_isa_lays_them_out(library):
    """Address, leading and stride offsets in 16 bytes at bits 0, 16 and 32; the swizzle of 128 bytes is 1 at bit 62."""
    library.lk_descriptor.restype = ctypes.c_uint64
    fields = lambda d: (d & 0x3FFF, d >> 16 & 0x3FFF, d >> 32 & 0x3FFF, d >> 62, d >> 46 & 0xFFFF)  # noqa: E731
    address, leading, stride, swizzle, rest = fields(library.lk_descriptor(0x2C400, 0))
    assert (address, stride, swizzle, rest) == (0x2C40, 64, 1, 0)
    address, leading, stride, swizzle, rest = fields(library.lk_descriptor(0x400, 64))
    assert (address, leading, stride, swizzle, rest) == (0x40, 512, 64, 1, 0)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 5), (8, 4), (19, 7)])
def test_tiles_are_visited_once(library, rows, cols):
    seen, out = [], (ctypes.c_int * 2)()
    for index in range(rows * cols):
        library.lk_tile_at(ctypes.c_int64(index), rows, cols, out)
        seen.append(tuple(out))
    assert sorted(seen) == [(row, col) for row in range(rows) for col in range(cols)]
    assert {row for row, _ in seen[: min(8, rows) * cols]} == set(range(min(8, rows)))


@pytest.mark.parametrize("forget", ["wait", "barrier", "second barrier"])
@pytest.mark.parametrize("early", [False, True])
def test_the_emulator_finds_races(library, forget, early):
    library.lk_emulate_faulty.restype = ctypes.c_char_p
    library.lk_emulate_settings(0, early)
    assert library.lk_emulate_faulty(0) == b""
    found = library.lk_emulate_faulty(["nothing", "wait", "barrier", "second barrier"].index(forget))
    assert found.startswith(b"race: "), found


def _choose(*args, **options):
    if not hasattr(_native.module, "cuda_tile"):
        pytest.skip(f"_C was built without cuda_tile: {_native.module_reason}")
    return _native.module.cuda_tile(*args, **options)


def test_tile_choice():
    tile = lambda *args: (_choose(*args)["rows"], _choose(*args)["cols"])  # noqa: E731
    assert tile(8192, 4096, 4096, 16, 132) == (128, 128)
    assert tile(1, 4096, 4096, 16, 132) == (16, 64)
    assert tile(16, 14336, 4096, 16, 108) == (16, 64)
    assert tile(512, 1024, 4096, 16, 132) == (64, 64)  # 32 tiles of 128 x 128 would leave a hundred idle
    assert tile(0, 0, 0, 0, 132) in {(128, 128), (64, 64), (16, 64)}


def test_h_is_cut_where_its_tiles_are_few():
    assert _choose(1, 4096, 4096, 16, 132)["splits"] == 8
    assert _choose(1, 4096, 1024, 16, 132)["splits"] == 2
    assert _choose(1, 4096, 300, 16, 132)["splits"] == 1
    assert _choose(65536, 4096, 4096, 64, 132)["splits"] == 1
    assert {_choose(m, 4096, 4096, 16, 132, invariant=True)["splits"] for m in (1, 64, 8192)} == {1}
