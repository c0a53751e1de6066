"""The native dropout mask against Philox4x32-10 in plain Python integers."""

import pytest
import torch

import lora_kernels  # noqa: F401  (defines and loads the ops)
from lora_kernels import _native

pytestmark = pytest.mark.skipif(not _native.cpu_available, reason=_native.cpu_reason)
dropout_mask = torch.ops.lora_kernels.dropout_mask
LOW = 0xFFFFFFFF


def philox(counter, key):
    c = list(counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & LOW, (p0 >> 32) ^ c[3] ^ k1, p0 & LOW]
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c


def expected_mask(seed, rows, cols, p):
    groups, threshold = (cols + 7) // 8, round(p * 65536)
    out = torch.zeros(rows, groups, dtype=torch.uint8)
    for g in range(rows * groups):
        words = philox((g & LOW, g >> 32, 0, 0), (seed & LOW, seed >> 32 & LOW))
        draws = [half for word in words for half in (word & 0xFFFF, word >> 16)]
        m, first = g // groups, g % groups * 8
        kept = [draws[i] >= threshold and first + i < cols for i in range(8)]
        out[m, g % groups] = sum(bit << i for i, bit in enumerate(kept))
    return out


def test_python_philox_has_the_published_answers():
    assert philox((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = philox((LOW, LOW, LOW, LOW), (LOW, LOW))
    assert ones == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 8), (5, 65), (7, 263), (1, 1000), (257, 3)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, -1, 0x123456789ABCDEF])
def test_bits(shape, p, seed):
    if p in (0.0, 0.999) and seed:
        seed ^= 1 << 40
    mask = dropout_mask(torch.tensor(seed), *shape, p)
    assert mask.shape == (shape[0], (shape[1] + 7) // 8)
    assert torch.equal(mask, expected_mask(seed, *shape, p))


def test_edges_of_p():
    seed = torch.tensor(5)
    assert not dropout_mask(seed, 9, 50, 1 - 1e-9).any()
    full = dropout_mask(seed, 4, 12, 0.0)
    assert torch.equal(full, torch.tensor([[255, 15]], dtype=torch.uint8).expand(4, 2))
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(RuntimeError, match="probability"):
            dropout_mask(seed, 4, 12, p)
    assert dropout_mask(seed, 0, 12, 0.5).shape == (0, 2)
    assert dropout_mask(seed, 3, 0, 0.5).shape == (3, 0)


def test_share_kept_and_threads():
    before = torch.get_num_threads()
    masks = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            masks.append(dropout_mask(torch.tensor(11), 512, 2048, 0.1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*masks)
    bits = (masks[0].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    assert abs(float(bits.float().mean()) - 0.9) < 0.002
