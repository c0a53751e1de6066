// One weight of an exact merge, in the arithmetic and the format of docs/residual_format.md: keys,
// rounding, the interval of the weights that merge to one value. The functions run on the host too,
// where the golden vectors test them. Every sum and product rounds to nearest by name: nothing can
// be contracted.
#pragma once

#include "device.h"

namespace lora_kernels {
namespace exact {

// Bits, keys and float32 values of a dtype. kInf is the key of Inf, that of -Inf is -kInf - 1;
// kTooBig the bits of the smallest float32 that rounds to Inf; kStep what lies between neighbours,
// in float32 bits.
template <class T>
struct Number;

template <>
struct Number<float> {
  static constexpr int32_t kInf = 0x7f800000, kStep = 1;
  static constexpr uint32_t kTooBig = 0x7f800000;
  static constexpr int kKeyBits = 32;
  static __device__ uint32_t bits(float v) { return __float_as_uint(v); }
  static __device__ float make(uint32_t bits) { return __uint_as_float(bits); }
  static __device__ float value(uint32_t bits) { return __uint_as_float(bits); }
  static __device__ uint32_t round(float u) { return __float_as_uint(u); }
};

template <>
struct Number<bf16> {
  static constexpr int32_t kInf = 0x7f80, kStep = 1 << 16;
  static constexpr uint32_t kTooBig = 0x7f7f8000;
  static constexpr int kKeyBits = 16;
  static __device__ uint32_t bits(bf16 v) { return v.bits; }
  static __device__ bf16 make(uint32_t bits) { return {static_cast<uint16_t>(bits)}; }
  static __device__ float value(uint32_t bits) { return __uint_as_float(bits << 16); }
  // In integers: the conversion instruction is not asked for its opinion of subnormals.
  static __device__ uint32_t round(float u) {
    const uint32_t b = __float_as_uint(u);
    return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  }
};

template <>
struct Number<f16> {
  static constexpr int32_t kInf = 0x7c00, kStep = 1 << 13;
  static constexpr uint32_t kTooBig = 0x477ff000;  // 65520
  static constexpr int kKeyBits = 16;
  static __device__ uint32_t bits(f16 v) { return v.bits; }
  static __device__ f16 make(uint32_t bits) { return {static_cast<uint16_t>(bits)}; }
  static __device__ float value(uint32_t bits) {
    return device::to_float(f16{static_cast<uint16_t>(bits)});
  }
  static __device__ uint32_t round(float u) { return device::from_float<f16>(u).bits; }
};

template <class T>
__device__ int32_t key_of(uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    const int32_t s = static_cast<int32_t>(bits);
    return s ^ ((s >> 31) & 0x7fffffff);
  } else {
    const int32_t s = static_cast<int32_t>(bits << 16) >> 16;
    return s ^ ((s >> 31) & 0x7fff);
  }
}
template <class T>
__device__ uint32_t bits_of(int32_t key) {
  if constexpr (sizeof(T) == 4) return static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff));
  return static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fff)) & 0xffffu;
}
template <class T>
__device__ float value_of(int32_t key) {
  return Number<T>::value(bits_of<T>(key));
}
template <class T>
__device__ int32_t round_key(float u) {
  return key_of<T>(Number<T>::round(u));
}

// One step of the update, from acc = +0 over the rank, ascending.
__device__ inline float factor(float b, float scale) { return __fmul_rn(scale, b); }
__device__ inline float step(float acc, float t, float a) { return __fmaf_rn(t, a, acc); }

// The merged key of the weight with this key.
template <class T>
__device__ int32_t merged(int32_t key, float acc) {
  return round_key<T>(__fadd_rn(value_of<T>(key), acc));
}

template <class T>
__device__ bool too_big(float u) {
  return (__float_as_uint(u) & 0x7fffffffu) >= Number<T>::kTooBig;
}

__device__ inline uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// A cheap proof that w is the only weight that merges to m, u = fl32(w + acc), where |w| is more
// than m's power of two. It is that of csrc/cpu/exact_vec.h, which says why it holds, step by step.
template <class T>
__device__ bool surely_unique(float w, float m, float acc, float u) {
  const int32_t exponent = static_cast<int32_t>(__float_as_uint(m) & 0x7f800000u);
  const int32_t size = static_cast<int32_t>(magnitude(w));
  if constexpr (sizeof(T) == 4) {
    const int32_t update = static_cast<int32_t>(magnitude(acc));
    const int32_t error = static_cast<int32_t>(magnitude(__fadd_rn(acc, -__fadd_rn(u, -w))));
    return size > exponent && size > update && u == m && error < exponent - (24 << 23);
  } else {
    constexpr int32_t kStep = Number<T>::kStep;
    constexpr int32_t kNear = kStep / 10000 * 4995 + kStep % 10000 * 4995 / 10000;
    const uint32_t off = __float_as_uint(u) - __float_as_uint(m) + static_cast<uint32_t>(kNear);
    return size > exponent && off <= static_cast<uint32_t>(2 * kNear);
  }
}

// The smallest key whose merged key is at least km (kLower), or the largest whose is at most km.
template <class T, bool kLower>
__device__ int32_t bisect(int32_t km, float acc) {
  int64_t in = kLower ? Number<T>::kInf : -int64_t{Number<T>::kInf} - 1;
  int64_t out = kLower ? -int64_t{Number<T>::kInf} - 1 : Number<T>::kInf;
#pragma unroll 1
  for (int i = 0; i < Number<T>::kKeyBits + 1; ++i) {
    const int64_t below = kLower ? out : in, above = kLower ? in : out;
    const int64_t middle = (below + above) >> 1;
    const int32_t found = merged<T>(static_cast<int32_t>(middle), acc);
    if (kLower ? found >= km : found <= km) {
      in = middle;
    } else {
      out = middle;
    }
  }
  return static_cast<int32_t>(in);
}

// About where w + acc leaves the values that round to m (key km): below (-1) or above (+1).
template <class T>
__device__ float edge(int32_t km, float acc, int side) {
  const float m = value_of<T>(km), next = value_of<T>(km + side);
  if constexpr (sizeof(T) == 4) {
    // A float32 has no midpoints: m - acc with its rounding error, then half a step.
    const float d = __fadd_rn(m, -acc), b = __fadd_rn(d, -m);
    const float e = __fadd_rn(__fadd_rn(m, -__fadd_rn(d, -b)), -__fadd_rn(acc, b));
    return __fadd_rn(d, __fadd_rn(e, __fmul_rn(__fadd_rn(next, -m), 0.5f)));
  } else {
    return __fadd_rn(__fadd_rn(__fmul_rn(m, 0.5f), __fmul_rn(next, 0.5f)), -acc);
  }
}

template <class T>
__device__ int32_t finite_key(int32_t key) {
  if (key >= Number<T>::kInf) return Number<T>::kInf - 1;
  return key <= -Number<T>::kInf - 1 ? -Number<T>::kInf : key;
}

struct Interval {
  int32_t lo, hi;
  __device__ bool empty() const { return lo > hi; }
  __device__ uint32_t range() const {
    return static_cast<uint32_t>(hi) - static_cast<uint32_t>(lo);
  }
  // Bits of an index into it; none where it is empty.
  __device__ int width() const {
    int bits = 0;
    for (uint32_t left = empty() ? 0 : range(); left != 0; left >>= 1) ++bits;
    return bits;
  }
};

// The keys that merge to km. A guess from the inverse in float32 is nearly always right or next to
// it, and two probes prove it; else all keys are bisected.
template <class T>
__device__ Interval interval(int32_t km, float acc) {
  Interval found;
  int32_t c = finite_key<T>(round_key<T>(edge<T>(km, acc, -1)));
  bool in = merged<T>(c, acc) >= km;
  int32_t p = in ? c - 1 : c + 1;
  bool sure = in != (merged<T>(p, acc) >= km);
  found.lo = in ? c : p;
  c = finite_key<T>(round_key<T>(edge<T>(km, acc, 1)));
  in = merged<T>(c, acc) <= km;
  p = in ? c + 1 : c - 1;
  sure = sure && in != (merged<T>(p, acc) <= km);
  found.hi = in ? c : p;
  if (!sure) {
    found.lo = bisect<T, true>(km, acc);
    found.hi = bisect<T, false>(km, acc);
  }
  return found;
}

// The checksum of a block: 16 lanes over its merged bits, then its bytes.
__device__ inline uint32_t mix(uint32_t v) {
  v *= 0x2c1b3c6du;
  return v ^ (v >> 15);
}
__device__ inline uint32_t lane_start(int64_t block, int lane) {
  return static_cast<uint32_t>(block) * 0x9e3779b1u + static_cast<uint32_t>(lane) + 1;
}

}  // namespace exact
}  // namespace lora_kernels
