"""The exact merge and its residual in plain numpy: the statement that every backend must reproduce, bit for bit.

    t = fl32(scaling · b)          acc = fma(t, a, acc) over the rank, ascending, from +0
    u = fl32(w + acc)              m = u rounded to the weight's dtype, to nearest even

``m`` never decreases as ``w`` grows (−0 before +0), so the weights that merge to ``m`` are an interval of
neighbours [lo, hi]. Which of them it was is kept in ``bit_width(hi − lo)`` bits. Format: docs/residual_format.md.
A `key` orders the values of a dtype as integers: neighbours differ by 1, −0 is −1, +0 is 0.
Signatures of ``KERNELS`` are the ops' own. Tensors on other devices are worked on in a copy.
"""

import contextlib

import numpy as np
import torch

BLOCK = 2048
OK, NOT_FINITE, MALFORMED, MISMATCH = range(4)
_ROWS = 64
_MIX = np.uint32(0x2C1B3C6D)


@contextlib.contextmanager
def ieee_arithmetic():
    """No flushing of subnormals in this thread, whatever ``torch.set_flush_denormal`` said."""
    tiny = np.float32(1.5e-38)
    flushes = bool(tiny * np.float32(0.5) == 0 or (tiny * np.float32(0.5)) * np.float32(2) == 0)
    if flushes:
        torch.set_flush_denormal(False)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        if flushes:
            torch.set_flush_denormal(True)


class Numbers:
    """Bits, keys, values and rounding of a dtype."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.uint = np.uint32 if dtype is torch.float32 else np.uint16
        self.bits = 8 * np.dtype(self.uint).itemsize
        self.flip = (1 << (self.bits - 1)) - 1
        self.inf = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}[dtype]

    def key(self, bits):
        signed = bits.view(np.int32 if self.bits == 32 else np.int16).astype(np.int64)
        return np.where(signed < 0, signed ^ self.flip, signed)

    def from_key(self, key):
        return np.where(key < 0, key ^ self.flip, key).astype(self.uint)

    def value(self, bits):
        if self.dtype is torch.float32:
            return bits.view(np.float32)
        if self.dtype is torch.float16:
            return bits.view(np.float16).astype(np.float32)
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)

    def round(self, u):
        """float32 to this dtype, to nearest even; as bits."""
        if self.dtype is torch.float32:
            return u.view(np.uint32)
        if self.dtype is torch.float16:
            return u.astype(np.float16).view(np.uint16)
        bits = u.view(np.uint32).astype(np.int64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    def merged(self, key, acc):
        """Key of the merged value of the weight with this key."""
        return self.key(self.round(self.value(self.from_key(key)) + acc))

    def interval(self, merged_key, acc):
        """Smallest and largest key that merge to ``merged_key``, by bisection over all finite keys."""
        low, high = np.full(acc.shape, -self.inf - 1), np.full(acc.shape, self.inf)
        first, last = (low.copy(), high.copy()), (low, high)
        for _ in range(self.bits + 1):
            mid = (first[0] + first[1]) >> 1
            inside = self.merged(mid, acc) >= merged_key
            first = np.where(inside, first[0], mid), np.where(inside, mid, first[1])
            mid = (last[0] + last[1]) >> 1
            inside = self.merged(mid, acc) <= merged_key
            last = np.where(inside, mid, last[0]), np.where(inside, last[1], mid)
        return first[1], last[0]


def to_bits(tensor):
    """A tensor's bits as an unsigned numpy array (a copy where it is not contiguous on the CPU)."""
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype is torch.float32:
        return plain.view(torch.int32).numpy().view(np.uint32)
    return plain.view(torch.int16).numpy().view(np.uint16)


def widen(tensor):
    """Float32 values, exactly."""
    return Numbers(tensor.dtype).value(to_bits(tensor))


def fused(t, a, acc):
    """fl32(t · a + acc) with one rounding.

    The product is exact in float64. The sum is rounded there to odd (an inexact result takes the neighbour whose
    last bit is 1), which leaves the later rounding to float32 as if it were the first.
    """
    product, c = t.astype(np.float64) * a.astype(np.float64), acc.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    even = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
    outward = (error > 0) == (total > 0)
    return np.where(even, bits + np.where(outward, 1, -1), bits).view(np.float64).astype(np.float32)


def update(lora_a, t):
    """acc (N, K) for a (R, K), t (N, R), both float32."""
    acc = np.zeros((t.shape[0], lora_a.shape[1]), np.float32)
    for r in range(lora_a.shape[0]):
        acc = fused(t[:, r, None], lora_a[None, r], acc)
    return acc


def blocks(rows, cols):
    """``(first row, last row, first column, last column)`` of every block, in order."""
    if rows == 0 or cols == 0:
        return []
    if cols < BLOCK:
        group = -(-BLOCK // cols)
        return [(i, min(i + group, rows), 0, cols) for i in range(0, rows, group)]
    edges = [*range(0, cols // BLOCK * BLOCK, BLOCK), cols]
    return [(i, i + 1, edges[j], edges[j + 1]) for i in range(rows) for j in range(len(edges) - 1)]


def _mix(v):
    v = v * _MIX
    return v ^ (v >> np.uint32(15))


def checksum(merged_bits, payload, index):
    """Hash of a block: 16 lanes over its merged weights, then its residual bytes as words."""
    padded = np.zeros(-(-merged_bits.size // 16) * 16, np.uint32)
    padded[: merged_bits.size] = merged_bits
    lane = np.uint32(index * 0x9E3779B1 & 0xFFFFFFFF) + np.arange(1, 17, dtype=np.uint32)
    for row in padded.reshape(-1, 16):
        lane = _mix(lane ^ row)
    total = np.array([merged_bits.size], np.uint32)
    words = np.frombuffer(payload + bytes(-len(payload) % 4), "<u4")
    for word in (*lane, *words):
        total = _mix(total ^ word)
    return int(total[0])


def encode(numbers, key, merged_bits, acc):
    """Residual bytes of one block."""
    lo, hi = numbers.interval(numbers.key(merged_bits), acc)
    widths = np.ceil(np.log2((hi - lo + 1).astype(np.float64))).astype(np.int64)
    starts = np.repeat(np.cumsum(widths) - widths, widths)
    places = np.arange(widths.sum()) - starts
    bits = (np.repeat(key - lo, widths) >> places) & 1
    payload = np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()
    raw = numbers.from_key(key)
    return payload if len(payload) < raw.nbytes else raw.astype(raw.dtype.newbyteorder("<")).tobytes()


def decode(numbers, payload, merged_bits, acc):
    """Bits of the weights of one block, or None where the bytes do not fit."""
    if len(payload) == merged_bits.nbytes:
        raw = np.frombuffer(payload, np.dtype(numbers.uint).newbyteorder("<")).astype(numbers.uint)
        same = numbers.merged(numbers.key(raw), acc) == numbers.key(merged_bits)
        return raw if same.all() else None
    lo, hi = numbers.interval(numbers.key(merged_bits), acc)
    if (lo > hi).any():
        return None
    widths = np.ceil(np.log2((hi - lo + 1).astype(np.float64))).astype(np.int64)
    if -(-int(widths.sum()) // 8) != len(payload):
        return None
    bits = np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little")[: widths.sum()].astype(np.int64)
    index = np.zeros(widths.size, np.int64)
    places = np.arange(widths.sum()) - np.repeat(np.cumsum(widths) - widths, widths)
    np.add.at(index, np.repeat(np.arange(widths.size), widths), bits << places)
    return numbers.from_key(lo + index) if (index <= hi - lo).all() else None


def split(body, spans, itemsize):
    """``[(payload, checksum)]`` of every block, or None where the body is not of this weight."""
    count = len(spans)
    if len(body) < 6 * count:
        return None
    sizes = np.frombuffer(body, "<u2", count).tolist()
    sums = np.frombuffer(body, "<u4", count, 2 * count).tolist()
    limits = [(r1 - r0) * (c1 - c0) * itemsize for r0, r1, c0, c1 in spans]
    if 6 * count + sum(sizes) != len(body) or any(s > limit for s, limit in zip(sizes, limits, strict=True)):
        return None
    ends = np.cumsum([6 * count, *sizes]).tolist()
    return [(body[a:b], s) for a, b, s in zip(ends[:-1], ends[1:], sums, strict=True)]


def join(pieces):
    """The body: sizes, checksums, payloads."""
    sizes = np.array([len(payload) for payload, _ in pieces], "<u2").tobytes()
    sums = np.array([total for _, total in pieces], "<u4").tobytes()
    return sizes + sums + b"".join(payload for payload, _ in pieces)


class _Update:
    """The update of an adapter, a span of rows at a time."""

    def __init__(self, lora_a, lora_b, scaling):
        self.a, b = widen(lora_a), widen(lora_b)
        scale = widen(scaling)
        self.t = scale * b
        self.finite = bool(np.isfinite(self.a).all() and np.isfinite(b).all() and np.isfinite(scale).all())
        self.first, self.last, self.rows = 0, 0, None

    def block(self, r0, r1, c0, c1):
        if not self.first <= r0 < r1 <= self.last:
            self.first, self.last = r0, max(r1, r0 + _ROWS)
            self.rows = update(self.a, self.t[self.first : self.last])
        return self.rows[r0 - self.first : r1 - self.first, c0:c1].reshape(-1)


def _pass(weight, undo, body, apply):
    """Undoes ``undo`` (with its body), then merges ``apply``; either may be None. ``(body, code, block)``."""
    with ieee_arithmetic():
        numbers = Numbers(weight.dtype)
        bits = to_bits(weight).copy()
        spans = blocks(*bits.shape)
        pieces = None if undo is None else split(body, spans, bits.itemsize)
        if undo is not None and pieces is None:
            return None, MALFORMED, -1
        terms = [None if term is None else _Update(*term) for term in (undo, apply)]
        if any(term is not None and not term.finite for term in terms):
            return None, NOT_FINITE, -1
        made = []
        for index, (r0, r1, c0, c1) in enumerate(spans):
            now = bits[r0:r1, c0:c1].reshape(-1)
            if undo is not None:
                payload, total = pieces[index]
                if checksum(now, payload, index) != total:
                    return None, MISMATCH, index
                now = decode(numbers, payload, now, terms[0].block(r0, r1, c0, c1))
                if now is None:
                    return None, MISMATCH, index
            if apply is not None:
                acc = terms[1].block(r0, r1, c0, c1)
                u = numbers.value(now) + acc
                merged = numbers.round(u)
                if not (np.isfinite(u) & np.isfinite(numbers.value(merged))).all():
                    return None, NOT_FINITE, index
                payload = encode(numbers, numbers.key(now), merged, acc)
                made.append((payload, checksum(merged, payload, index)))
                now = merged
            bits[r0:r1, c0:c1] = now.reshape(r1 - r0, c1 - c0)
    signed = torch.from_numpy(bits.view(np.int32 if numbers.bits == 32 else np.int16))
    with torch.no_grad():
        weight.copy_(signed.view(weight.dtype).reshape(weight.shape))
    return join(made), OK, -1


def _status(weight, code, block):
    return torch.tensor([code, block], dtype=torch.int64, device=weight.device)


def _bytes(weight, data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(weight.device) if data else _empty(weight)


def _empty(weight):
    return torch.empty(0, dtype=torch.uint8, device=weight.device)


def merge_exact_(weight, lora_a, lora_b, scaling):
    body, *status = _pass(weight, None, b"", (lora_a, lora_b, scaling))
    return _bytes(weight, body), _status(weight, *status)


def unmerge_exact_(weight, lora_a, lora_b, scaling, body):
    _, *status = _pass(weight, (lora_a, lora_b, scaling), body.cpu().numpy().tobytes(), None)
    return _status(weight, *status)


def switch_exact_(weight, old_a, old_b, old_scaling, new_a, new_b, new_scaling, body):
    old, new = (old_a, old_b, old_scaling), (new_a, new_b, new_scaling)
    made, *status = _pass(weight, old, body.cpu().numpy().tobytes(), new)
    return _bytes(weight, made), _status(weight, *status)


KERNELS = {"merge_exact_": merge_exact_, "unmerge_exact_": unmerge_exact_, "switch_exact_": switch_exact_}
