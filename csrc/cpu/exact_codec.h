// One block of an exact merge: weights to merged weights and residual bits, and back, in place.
//
// Most merged values have one preimage only, which a few operations prove. The others are put side
// by side in a queue, so that the dearer work is done on full vectors:
//   1. over the block: merge (or guess w = round(m - acc)), hash m, queue what is not surely unique
//   2. over the queue: the interval of keys with this merged value (exact_interval.h); key - lo is
//      written or read in bit_width(hi - lo) bits.
// A block whose bits would take as many bytes as its weights is stored as the weights themselves.
#pragma once

#include "exact.h"
#include "exact_bits.h"
#include "exact_interval.h"

namespace lora_kernels {
namespace LK_ISA {

struct Queue {
  static constexpr int kRoom = kExactMaxBlock + 17;
  uint16_t at[kRoom];        // positions in the block
  uint8_t bytes[4 * kRoom];  // what is read, and beyond
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

// find(bits, updates, &first, &range) for each vector of the queue, then use(positions, its lanes,
// first, range); the last vector is filled up with the last element. Eight at a time, as each of
// the two is a chain of its own: the next one begins while it is under way.
template <class T, class Find, class Use>
LK_INLINE bool for_each_queued(Queue& q, int64_t size, const T* from, const float* acc,
                               const Find& find, const Use& use) {
  constexpr int64_t kBatch = 8;
  for (int64_t i = size; i > 0 && i < size + kN - 1; ++i) q.at[i] = q.at[i - 1];
  for (int64_t i = 0; i < size; i += kBatch * kN) {
    iv first[kBatch];
    uv range[kBatch];
    const int64_t end = size - i < kBatch * kN ? size - i : kBatch * kN;
    for (int64_t v = 0; v * kN < end; ++v) {
      const uint16_t* const at = q.at + i + v * kN;
      find(take(from, at), (fv)take(acc, at), first + v, range + v);
    }
    for (int64_t v = 0; v * kN < end; ++v) {
      const uint32_t on = end - v * kN < kN ? (1u << (end - v * kN)) - 1u : kAllLanes;
      if (!use(q.at + i + v * kN, on, first[v], range[v])) return false;
    }
  }
  return true;
}

// step(weights, updates, position, valid lanes) over a strip, 16 weights at a time; the last ones
// through buffers that are zero beyond the end.
template <class T, class Step>
LK_INLINE void for_each_16(T* w, const float* acc, int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) step(w + i, acc + i, i, 0xffffu);
  if (i < n) {
    T in[16] = {};
    float a[16] = {};
    const size_t left = static_cast<size_t>(n - i);
    std::memcpy(static_cast<void*>(in), w + i, left * sizeof(T));
    std::memcpy(a, acc + i, left * sizeof(float));
    step(in, a, i, (1u << left) - 1u);
    std::memcpy(static_cast<void*>(w + i), in, left * sizeof(T));
  }
}

// ---- encode ----

// The indices of the queue's weights in their intervals. Returns their bytes; `out` has room for 8
// more.
template <class T>
uint32_t write_indices(Queue& q, int64_t size, const T* was, const float* acc, uint8_t* out) {
  BitWriter to = {out};
  for_each_queued(
      q, size, was, acc,
      [](uv w, fv a, iv* index, uv* range) LK_INLINED {
        interval<T>(Num<T>::round(Num<T>::widen(w) + a), a, index, range);
        *index = Num<T>::key(w) - *index;
      },
      [&](const uint16_t*, uint32_t on, iv index, uv range) LK_INLINED {
        put_lanes(to, index, range, on);
        return true;
      });
  return static_cast<uint32_t>(to.out - out) + (to.held > 0);
}

// Merges w[n] in place; was[n] keeps what it was, with room for 16 more. *piece describes what was
// put at `out` (n * sizeof(T) + 8 bytes). False when a result is not finite; w was finite where its
// result is.
template <class T>
bool encode(T* w, const float* acc, int64_t n, int64_t block, T* was, uint8_t* out,
            ExactPiece* piece, Queue& q) {
  Hash h = hash_start(block);
  iv worst = {};
  int64_t size = 0;
  for_each_16(w, acc, n, [&](T* w16, const float* acc16, int64_t i, uint32_t on) LK_INLINED {
#pragma GCC unroll 4
    for (int s = 0; s < kSub; ++s) {
      const int at = s * kN;
      const uv wb = Num<T>::load(w16 + at);
      const fv wv = Num<T>::widen(wb), a = read<fv>(acc16 + at), u = wv + a;
      const uv mb = Num<T>::round(u);
      worst = larger(worst, magnitude(u));
      Num<T>::store(was + i + at, wb);
      Num<T>::store(w16 + at, mb);
      h.lane[s] = mix(h.lane[s] ^ mb);
      const uint32_t some = ~lanes(surely_unique<T>(wv, Num<T>::widen(mb), a, u)) & (on >> at);
      write_lanes(q.at + size, some & kAllLanes, i + at);
      size += __builtin_popcount(some & kAllLanes);
    }
  });
  if (lanes(worst > static_cast<int32_t>(Num<T>::kTooBig - 1)) != 0) return false;
  if (piece == nullptr) return true;
  const uint32_t raw = static_cast<uint32_t>(n * static_cast<int64_t>(sizeof(T)));
  piece->data = out;
  piece->size = write_indices(q, size, was, acc, out);
  if (piece->size >= raw) {
    piece->size = raw;
    std::memcpy(out, was, raw);
  }
  piece->sum = hash_end(h, n, out, piece->size);
  return true;
}

// ---- decode ----

// Whether w[n], raw weights of the residual, merges to m[n].
template <class T>
bool merges_to(T* w, const float* acc, int64_t n, const T* m) {
  iv wrong = {};
  for_each_16(w, acc, n, [&](const T* w16, const float* acc16, int64_t i, uint32_t on) LK_INLINED {
    for (int s = 0; s < kSub; ++s) {
      const int at = s * kN;
      const fv u = Num<T>::widen(Num<T>::load(w16 + at)) + read<fv>(acc16 + at);
      wrong |= lane_set(on >> at) & (Num<T>::round(u) != Num<T>::load(m + i + at));
    }
  });
  return lanes(wrong) == 0;
}

// Weights of the queue from the bits of the piece. False where they are not what encoding writes.
template <class T>
bool read_indices(Queue& q, int64_t size, const T* merged, const float* acc, uint32_t bytes, T* w) {
  BitReader from = {q.bytes};
  const auto put_back = [&](const uint16_t* at, uint32_t on, iv lo, uv range) LK_INLINED {
    iv key;
    if (!take_lanes(from, range, on, &key)) return false;
    key += lo;
    const iv finite = (key > -Num<T>::kInf - 1) & (key < Num<T>::kInf);
    if ((~lanes(finite) & on) != 0) return false;
    uint32_t bits[kN];
    write(bits, Num<T>::bits(key));
    const auto put = [&](int lane) {
      std::memcpy(static_cast<void*>(w + at[lane]), bits + lane, sizeof(T));
    };
    if (__builtin_expect(on == kAllLanes, 1)) {
#pragma GCC unroll 16
      for (int lane = 0; lane < kN; ++lane) put(lane);
    } else {
      for (int lane = 0; on >> lane != 0; ++lane) put(lane);
    }
    return true;
  };
  const bool fits = for_each_queued(
      q, size, merged, acc,
      [](uv m, fv a, iv* lo, uv* range) LK_INLINED { interval<T>(m, a, lo, range); }, put_back);
  return fits && (from.at + 7) / 8 == bytes;
}

// Undoes w[n] in place with its piece; was[n] keeps what it was, with room for 16 more. False when
// the piece is not that of w.
template <class T>
bool decode(T* w, const float* acc, int64_t n, int64_t block, const ExactPiece& piece, T* was,
            Queue& q) {
  Hash h = hash_start(block);
  int64_t size = 0;
  for_each_16(w, acc, n, [&](T* w16, const float* acc16, int64_t i, uint32_t on) LK_INLINED {
#pragma GCC unroll 4
    for (int s = 0; s < kSub; ++s) {
      const int at = s * kN;
      const uv mb = Num<T>::load(w16 + at);
      const fv mv = Num<T>::widen(mb), a = read<fv>(acc16 + at);
      const uv wb = Num<T>::round(mv - a);
      const fv wv = Num<T>::widen(wb);
      Num<T>::store(was + i + at, mb);
      Num<T>::store(w16 + at, wb);
      h.lane[s] = mix(h.lane[s] ^ mb);
      const uint32_t some = ~lanes(surely_unique<T>(wv, mv, a, wv + a)) & (on >> at);
      write_lanes(q.at + size, some & kAllLanes, i + at);
      size += __builtin_popcount(some & kAllLanes);
    }
  });
  if (hash_end(h, n, piece.data, piece.size) != piece.sum) return false;
  if (piece.size == static_cast<size_t>(n) * sizeof(T)) {
    std::memcpy(static_cast<void*>(w), piece.data, piece.size);
    return merges_to(w, acc, n, was);
  }
  std::memcpy(q.bytes, piece.data, piece.size);
  return read_indices(q, size, was, acc, piece.size, w);
}

}  // namespace LK_ISA
}  // namespace lora_kernels
