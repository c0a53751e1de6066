"""The dropout mask that every backend draws alike: Philox4x32-10 counters, one bit an element.

Group ``g = row · ceil(num_cols / 8) + col // 8`` of eight columns is one Philox call with counter (g, 0) and
the seed as key; column ``c`` keeps its value when its 16-bit draw is not below ``round(p · 65536)``.
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.) Here in torch integer operations, on
any device, as the statement that kernels are checked against.
"""

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def threshold(p):
    """Draws below this 16-bit value are dropped."""
    return round(p * 65536)


def _mul(constant, word):
    """(high, low) 32-bit halves of ``constant · word``, in int64 without overflow."""
    low = constant * (word & 0xFFFF)
    high = constant * (word >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter, key_low, key_high):
    """Four 32-bit words (as int64) for each 64-bit ``counter``."""
    c0, c1 = counter & _LOW, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(10):
        high0, low0 = _mul(_M0, c0)
        high1, low1 = _mul(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key_low, low1, high0 ^ c3 ^ key_high, low0
        key_low, key_high = (key_low + _W0) & _LOW, (key_high + _W1) & _LOW
    return c0, c1, c2, c3


def dropout_mask(seed, num_rows, num_cols, p):
    """Packed keep bits, uint8 (num_rows, ceil(num_cols / 8)), least significant bit first; padding bits 0."""
    groups = (num_cols + 7) // 8
    counter = torch.arange(num_rows * groups, dtype=torch.int64, device=seed.device)
    words = philox(counter, seed & _LOW, (seed >> 32) & _LOW)
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=1)
    keep = (lanes >= threshold(p)).view(num_rows, groups * 8)
    keep[:, num_cols:] = False
    weights = 1 << torch.arange(8, device=seed.device)
    return (keep.view(num_rows, groups, 8) * weights).sum(-1).to(torch.uint8)


def unpack_mask(mask, num_cols):
    """Boolean (num_rows, num_cols) from packed bits."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.reshape(mask.shape[0], -1)[:, :num_cols].bool()
