// One block of an exact merge: weights to merged weights and residual bits, and back.
//
// Most merged values have one preimage only, which a few operations prove. The others are put side
// by side in a queue, so that the dearer work is done on full vectors:
//   1. over the block: merge (or guess w = round(m - acc)), hash m, queue what is not surely unique
//   2. over the queue: the interval [lo, hi] of keys with this merged value. A guess from the
//      inverse in float arithmetic is nearly always right or next to it, two probes prove it;
//      where they do not, the whole vector is bisected over all keys. key - lo is written or read
//      in bit_width(hi - lo) bits.
// A block whose bits would take as many bytes as its weights is stored as the weights themselves.
#pragma once

#include "exact.h"
#include "exact_vec.h"

namespace lora_kernels {
namespace LK_ISA {

#define LK_INLINED __attribute__((always_inline))  // for a lambda

struct Queue {
  int32_t at[kExactMaxBlock + kN];    // position in the block, when decoding
  int32_t bits[kExactMaxBlock + kN];  // of the weight (encoding) or of the merged value (decoding)
  int32_t acc[kExactMaxBlock + kN];   // of the update
  uint8_t bytes[4 * kExactMaxBlock + 8];  // what is read, and beyond
  int64_t size;
};

// ---- the hash of a block: 16 lanes over its merged bits, then its residual bytes ----

LK_INLINE uv mix(uv v) {
  v = v * 0x2c1b3c6du;
  return v ^ (v >> 15);
}
LK_INLINE uint32_t mix(uint32_t v) {
  v *= 0x2c1b3c6du;
  return v ^ (v >> 15);
}

struct Hash {
  uv lane[kSub];
};

LK_INLINE Hash hash_start(int64_t block) {
  Hash h;
  uint32_t seed[16];
  for (uint32_t l = 0; l < 16; ++l) seed[l] = static_cast<uint32_t>(block) * 0x9e3779b1u + l + 1;
  for (int s = 0; s < kSub; ++s) h.lane[s] = read<uv>(seed + s * kN);
  return h;
}

inline uint32_t hash_end(const Hash& h, int64_t n, const uint8_t* data, uint32_t size) {
  uint32_t lane[16], sum = static_cast<uint32_t>(n);
  for (int s = 0; s < kSub; ++s) write(lane + s * kN, h.lane[s]);
  for (int l = 0; l < 16; ++l) sum = mix(sum ^ lane[l]);
  for (uint32_t i = 0; i < size; i += 4) {
    uint8_t word[4] = {0, 0, 0, 0};
    std::memcpy(word, data + i, size - i < 4 ? size - i : 4);
    sum = mix(sum ^ (word[0] | static_cast<uint32_t>(word[1]) << 8 |
                     static_cast<uint32_t>(word[2]) << 16 | static_cast<uint32_t>(word[3]) << 24));
  }
  return sum;
}

// ---- the interval of keys that merge to m ----

template <class T>
LK_INLINE iv clamp_finite(iv k) {
  k = pick(k < Num<T>::kInf, k, isplat(Num<T>::kInf - 1));
  return pick(k > -Num<T>::kInf - 1, k, isplat(-Num<T>::kInf));
}

// About where w + acc leaves the values that round to m (key km): below or above.
template <class T>
struct Inverse {
  fv m, acc;
  iv km;
  LK_INLINE Inverse(iv k, fv a) : m(value<T>(k)), acc(a), km(k) {}
  LK_INLINE fv edge(int side) const {
    return (m * splat(0.5f) + value<T>(km + side) * splat(0.5f)) - acc;
  }
};
// A float32 has no midpoints: m - acc with its rounding error, then half a step.
template <>
struct Inverse<float> {
  fv m, d, e;
  iv km;
  LK_INLINE Inverse(iv k, fv a) : m(value<float>(k)), d(m - a), km(k) {
    const fv b = d - m;
    e = (m - (d - b)) - (a + b);
  }
  LK_INLINE fv edge(int side) const {
    return d + (e + (value<float>(km + side) - m) * splat(0.5f));
  }
};

// The smallest key whose merged key is at least km (kLower), or the largest whose is at most km.
template <class T, bool kLower>
LK_INLINE iv bisect(iv km, fv acc) {
  iv in = isplat(kLower ? Num<T>::kInf : -Num<T>::kInf - 1);
  iv out = isplat(kLower ? -Num<T>::kInf - 1 : Num<T>::kInf);
  for (int step = 0; step < Num<T>::kKeyBits + 1; ++step) {
    const iv below = kLower ? out : in, above = kLower ? in : out;
    const iv mid = (iv)((uv)below + (((uv)above - (uv)below) >> 1));
    // The last steps repeat the lower end, which stays where it is.
    const iv f = merged<T>(mid, acc);
    const iv inside = kLower ? f >= km : f <= km;
    in = pick(inside, mid, in);
    out = pick(inside, out, mid);
  }
  return in;
}

template <class T>
LK_INLINE void interval(iv km, fv acc, iv* lo, iv* hi) {
  const Inverse<T> inverse(km, acc);
  iv c = clamp_finite<T>(round_key<T>(inverse.edge(-1)));
  iv in = merged<T>(c, acc) >= km;
  iv p = pick(in, c - 1, c + 1);
  iv sure = in ^ (merged<T>(p, acc) >= km);
  *lo = pick(in, c, p);

  c = clamp_finite<T>(round_key<T>(inverse.edge(1)));
  in = merged<T>(c, acc) <= km;
  p = pick(in, c + 1, c - 1);
  sure &= in ^ (merged<T>(p, acc) <= km);
  *hi = pick(in, c, p);
  if (__builtin_expect(lanes(sure) != kAllLanes, 0)) {
    *lo = bisect<T, true>(km, acc);
    *hi = bisect<T, false>(km, acc);
  }
}

// Appends the lanes of `some` at `size`; returns the size then.
template <bool kEncode>
LK_INLINE int64_t push(Queue& q, int64_t size, uint32_t some, int64_t from, uv bits, fv acc) {
  const Compress compress(some);
  if (!kEncode) write(q.at + size, compress.numbers() + static_cast<int32_t>(from));
  write(q.bits + size, compress((iv)bits));
  write(q.acc + size, compress((iv)acc));
  return size + __builtin_popcount(some);
}

// visit(position in the queue, its lanes, their keys and updates) for each vector of the queue; the
// last one is filled up with the last element.
template <class T, class Visit>
LK_INLINE bool for_each_queued(Queue& q, const Visit& visit) {
  for (int64_t i = q.size; i > 0 && i < q.size + kN - 1; ++i) {
    q.bits[i] = q.bits[i - 1];
    q.acc[i] = q.acc[i - 1];
  }
  for (int64_t i = 0; i < q.size; i += kN) {
    const uint32_t on = q.size - i < kN ? (1u << (q.size - i)) - 1u : kAllLanes;
    if (!visit(i, on, Num<T>::key(read<uv>(q.bits + i)), read<fv>(q.acc + i))) return false;
  }
  return true;
}

// step(w, acc, merged, position, valid lanes) over a block, 16 weights at a time; the last ones
// through buffers that are zero beyond the end.
template <class T, class Step>
LK_INLINE void for_each_16(const T* from, const float* acc, T* to, int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) step(from + i, acc + i, to + i, i, 0xffffu);
  if (i < n) {
    T in[16] = {}, out[16];
    float a[16] = {};
    const size_t left = static_cast<size_t>(n - i);
    std::memcpy(static_cast<void*>(in), from + i, left * sizeof(T));
    std::memcpy(a, acc + i, left * sizeof(float));
    step(in, a, out, i, (1u << left) - 1u);
    std::memcpy(static_cast<void*>(to + i), out, left * sizeof(T));
  }
}

// ---- bits, lowest first ----

LK_INLINE int bit_width(uint32_t x) { return 63 - __builtin_clzll(2 * uint64_t{x} + 1); }

LK_INLINE uint64_t read_le64(const uint8_t* p) {
  uint64_t x = 0;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  std::memcpy(&x, p, 8);
#else
  for (int b = 0; b < 8; ++b) x |= static_cast<uint64_t>(p[b]) << (8 * b);
#endif
  return x;
}
LK_INLINE void write_le64(uint8_t* p, uint64_t x) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  std::memcpy(p, &x, 8);
#else
  for (int b = 0; b < 8; ++b) p[b] = static_cast<uint8_t>(x >> (8 * b));
#endif
}

// Up to 56 bits a time; 8 bytes beyond the end are touched.
struct BitWriter {
  uint8_t* out;
  uint64_t bits = 0;  // the lowest `held` of the next bytes
  int held = 0;
  LK_INLINE void put(uint64_t value, int width) {
    bits |= value << held;
    held += width;
    write_le64(out, bits);
    out += held >> 3;
    bits >>= held & ~7;
    held &= 7;
  }
};
struct BitReader {
  const uint8_t* data;
  uint64_t at = 0;
  LK_INLINE uint64_t take(int width) {
    const uint64_t word = read_le64(data + (at >> 3)) >> (at & 7);
    at += static_cast<uint64_t>(width);
    return word & ((uint64_t{1} << width) - 1);
  }
};

// The indices of a vector of the queue, in bit_width(range) bits each: as one word where they are
// few, else one by one.
LK_INLINE void put_lanes(BitWriter& to, iv index, uv range, uint32_t on) {
  uint32_t lane = 0;
#if defined(LK_PACKS_LANES)
  const iv set = lane_set(on), width = bit_widths(range) & set;
  if (__builtin_expect(lanes((iv)(range >> 24 != 0)) == 0, 1)) {
    for (int part = 0; part < kEights; ++part, lane += 8) {
      int total;
      const __m256i offset = lane_offsets(eight(width, part), &total);
      if (__builtin_expect(total > 56, 0)) break;
      to.put(pack_lanes(eight(index & set, part), offset), total);
    }
  }
#endif
  for (; on >> lane != 0; ++lane) {
    to.put(static_cast<uint32_t>(index[lane]), bit_width(range[lane]));
  }
}

// False where an index is not below or at its range; that of an empty interval is -1.
LK_INLINE bool take_lanes(BitReader& from, uv range, uint32_t on, iv* index) {
  uint32_t out[kN] = {}, lane = 0;
#if defined(LK_PACKS_LANES)
  const iv width = bit_widths(range) & lane_set(on);
  if (__builtin_expect(lanes((iv)(range >> 24 != 0)) == 0, 1)) {
    for (int part = 0; part < kEights; ++part, lane += 8) {
      int total;
      const __m256i wide = eight(width, part), offset = lane_offsets(wide, &total);
      if (__builtin_expect(total > 56, 0)) break;
      write(out + lane, unpack_lanes(from.take(total), wide, offset));
    }
  }
#endif
  bool fits = true;
  for (; on >> lane != 0; ++lane) {
    fits &= range[lane] != ~uint32_t{0};
    out[lane] = static_cast<uint32_t>(from.take(bit_width(range[lane])));
  }
  const uv found = read<uv>(out);
  *index = (iv)found;
  return fits && (lanes((iv)(found > range)) & on) == 0;
}

// ---- encode ----

// The indices of the queue's weights in their intervals. Returns their bytes; `out` has room for 8
// more.
template <class T>
uint32_t write_indices(Queue& q, uint8_t* out) {
  BitWriter to = {out};
  for_each_queued<T>(q, [&](int64_t, uint32_t on, iv key, fv acc) LK_INLINED {
    iv lo, hi;
    interval<T>(merged<T>(key, acc), acc, &lo, &hi);
    put_lanes(to, key - lo, (uv)hi - (uv)lo, on);
    return true;
  });
  return static_cast<uint32_t>(to.out - out) + (to.held > 0);
}

// m[n] = merged w[n]; *piece describes what was put at `out` (n * sizeof(T) + 8 bytes). False when
// a result is not finite; w is finite where m is.
template <class T>
bool encode(const T* w, const float* acc, int64_t n, int64_t block, T* m, uint8_t* out,
            ExactPiece* piece, Queue& q) {
  Hash h = hash_start(block);
  iv bad = {};
  int64_t size = 0;
  for_each_16(w, acc, m, n, [&](const T* w16, const float* acc16, T* m16, int64_t i, uint32_t on) {
#pragma GCC unroll 4
    for (int s = 0; s < kSub; ++s) {
      const int at = s * kN;
      const uv wb = Num<T>::load(w16 + at);
      const fv wv = Num<T>::widen(wb), a = read<fv>(acc16 + at), u = wv + a;
      const uv mb = Num<T>::round(u);
      bad |= magnitude(u) > static_cast<int32_t>(Num<T>::kTooBig - 1);
      Num<T>::store(m16 + at, mb);
      h.lane[s] = mix(h.lane[s] ^ mb);
      const uint32_t some = ~lanes(surely_unique<T>(wv, Num<T>::widen(mb), a, u)) & (on >> at);
      size = push<true>(q, size, some & kAllLanes, i + at, wb, a);
    }
  });
  q.size = size;
  if (lanes(bad) != 0) return false;
  if (piece == nullptr) return true;
  const uint32_t raw = static_cast<uint32_t>(n * static_cast<int64_t>(sizeof(T)));
  piece->data = out;
  piece->size = write_indices<T>(q, out);
  if (piece->size >= raw) {
    piece->size = raw;
    std::memcpy(out, w, raw);
  }
  piece->sum = hash_end(h, n, out, piece->size);
  return true;
}

// ---- decode ----

// Whether w[n], raw weights of the residual, merges to m[n].
template <class T>
bool merges_to(const T* w, const float* acc, int64_t n, const T* m) {
  for (int64_t i = 0; i < n; i += kN) {
    T in[kN] = {}, want[kN] = {};
    float a[kN] = {};
    const size_t count = static_cast<size_t>(n - i < kN ? n - i : kN);
    std::memcpy(static_cast<void*>(in), w + i, count * sizeof(T));
    std::memcpy(static_cast<void*>(want), m + i, count * sizeof(T));
    std::memcpy(a, acc + i, count * sizeof(float));
    const iv made = merged<T>(Num<T>::key(Num<T>::load(in)), read<fv>(a));
    if (lanes(made != Num<T>::key(Num<T>::load(want))) != 0) return false;
  }
  return true;
}

// Weights of the queue from the bits of the piece. False where they are not what encode() writes.
template <class T>
bool read_indices(Queue& q, const ExactPiece& piece, T* w) {
  std::memcpy(q.bytes, piece.data, piece.size);
  BitReader from = {q.bytes};
  const bool fits =
      for_each_queued<T>(q, [&](int64_t i, uint32_t on, iv merged_key, fv acc) LK_INLINED {
        iv lo, hi;
        interval<T>(merged_key, acc, &lo, &hi);
        iv key;
        if (!take_lanes(from, (uv)hi - (uv)lo, on, &key)) return false;
        key += lo;
        const iv finite = (key > -Num<T>::kInf - 1) & (key < Num<T>::kInf);
        if ((~lanes(finite) & on) != 0) return false;
        uint32_t bits[kN];
        write(bits, Num<T>::bits(key));
        const auto put = [&](int lane) {
          std::memcpy(static_cast<void*>(w + q.at[i + lane]), bits + lane, sizeof(T));
        };
        if (__builtin_expect(on == kAllLanes, 1)) {
#pragma GCC unroll 16
          for (int lane = 0; lane < kN; ++lane) put(lane);
        } else {
          for (int lane = 0; on >> lane != 0; ++lane) put(lane);
        }
        return true;
      });
  return fits && (from.at + 7) / 8 == piece.size;
}

// w[n] from m[n] and its piece. False when the piece is not that of m.
template <class T>
bool decode(const T* m, const float* acc, int64_t n, int64_t block, const ExactPiece& piece, T* w,
            Queue& q) {
  Hash h = hash_start(block);
  int64_t size = 0;
  for_each_16(m, acc, w, n, [&](const T* m16, const float* acc16, T* w16, int64_t i, uint32_t on) {
#pragma GCC unroll 4
    for (int s = 0; s < kSub; ++s) {
      const int at = s * kN;
      const uv mb = Num<T>::load(m16 + at);
      const fv mv = Num<T>::widen(mb), a = read<fv>(acc16 + at);
      const uv wb = Num<T>::round(mv - a);
      const fv wv = Num<T>::widen(wb);
      Num<T>::store(w16 + at, wb);
      h.lane[s] = mix(h.lane[s] ^ mb);
      const uint32_t some = ~lanes(surely_unique<T>(wv, mv, a, wv + a)) & (on >> at);
      size = push<false>(q, size, some & kAllLanes, i + at, mb, a);
    }
  });
  q.size = size;
  if (hash_end(h, n, piece.data, piece.size) != piece.sum) return false;
  if (piece.size == static_cast<size_t>(n) * sizeof(T)) {
    std::memcpy(static_cast<void*>(w), piece.data, piece.size);
    return merges_to(w, acc, n, m);
  }
  return read_indices(q, piece, w);
}

}  // namespace LK_ISA
}  // namespace lora_kernels
