// The AVX-512 instructions that csrc/cpu uses, on a CPU with AVX2: for tests, never for a release.
//
// Included before every source of the levels avx512 and avx512bf16 (-include, LK_EMULATE_AVX512):
// the sources are compiled as they are, with each intrinsic replaced by lanes of plain C++. Meaning
// is that of Intel's manual, down to NaN, signed zero, subnormals under DAZ and the order of a
// lane's sums; speed is not. An intrinsic that is missing here does not compile.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "lora_kernels/scalar.h"

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1

namespace lora_kernels_emulate {

using lora_kernels::bits_float;
using lora_kernels::float_bits;

// Not inlined: an unrolled kernel would grow a hundredfold.
#define LK_EMULATED [[maybe_unused, gnu::noinline]] static

// The bytes of a register as COUNT lanes of T.
template <class T, int COUNT>
struct Lanes {
  static constexpr int count = COUNT;
  T lane[COUNT];
  Lanes() = default;
  template <class V, class = std::enable_if_t<sizeof(V) == sizeof(T) * COUNT>>
  Lanes(const V& v) {
    std::memcpy(lane, &v, sizeof v);
  }
  template <class V, class = std::enable_if_t<sizeof(V) == sizeof(T) * COUNT>>
  operator V() const {
    V v;
    std::memcpy(&v, lane, sizeof v);
    return v;
  }
  T& operator[](int i) { return lane[i]; }
  T operator[](int i) const { return lane[i]; }
};
using F = Lanes<float, 16>;
using I16 = Lanes<uint16_t, 32>;
using I32 = Lanes<uint32_t, 16>;
using I64 = Lanes<uint64_t, 8>;
using H16 = Lanes<uint16_t, 16>;

template <class L, class Fn>
inline L each(Fn fn) {
  L out;
  for (int i = 0; i < L::count; i++) out[i] = fn(i);
  return out;
}

// Constants.
LK_EMULATED __m512 setzero_ps() {
  return F(each<F>([](int) { return 0.0f; }));
}
LK_EMULATED __m512 set1_ps(float x) {
  return each<F>([=](int) { return x; });
}
LK_EMULATED __m512i set1_epi16(int16_t x) {
  return each<I16>([=](int) { return static_cast<uint16_t>(x); });
}
LK_EMULATED __m512i set1_epi32(int x) {
  return each<I32>([=](int) { return static_cast<uint32_t>(x); });
}
LK_EMULATED __m512i set1_epi64(int64_t x) {
  return each<I64>([=](int) { return static_cast<uint64_t>(x); });
}
LK_EMULATED __m512i setr_epi64(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f,
                               int64_t g, int64_t h) {
  const int64_t all[] = {a, b, c, d, e, f, g, h};
  return each<I64>([&](int i) { return static_cast<uint64_t>(all[i]); });
}

LK_EMULATED __m512i broadcast_i32x4(__m128i a) {
  uint32_t all[4];
  std::memcpy(all, &a, 16);
  return each<I32>([&](int i) { return all[i % 4]; });
}

// Another view of the same bits.
LK_EMULATED __m512i castps_si512(__m512 a) { return (__m512i)a; }
LK_EMULATED __m512 castsi512_ps(__m512i a) { return (__m512)a; }
LK_EMULATED __m256i castsi512_si256(__m512i a) {
  const I16 v = a;
  return each<H16>([&](int i) { return v[i]; });
}
LK_EMULATED __m256i extracti64x4_epi64(__m512i a, int part) {
  const I16 v = a;
  return each<H16>([&](int i) { return v[part * 16 + i]; });
}

// Memory. A lane that is masked off is not touched.
template <class L, class T>
inline L load_some(uint64_t mask, const void* p) {
  return each<L>([&](int i) -> T {
    T x = 0;
    if (mask >> i & 1) std::memcpy(&x, static_cast<const T*>(p) + i, sizeof x);
    return x;
  });
}
template <class T, class L>
inline void store_some(void* p, uint64_t mask, L a) {
  for (int i = 0; i < L::count; i++) {
    if (mask >> i & 1) std::memcpy(static_cast<T*>(p) + i, &a.lane[i], sizeof(T));
  }
}
LK_EMULATED __m512 loadu_ps(const void* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
LK_EMULATED __m512i loadu_si512(const void* p) {
  I64 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
LK_EMULATED void storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, sizeof a); }
LK_EMULATED void storeu_si512(void* p, __m512i a) { std::memcpy(p, &a, sizeof a); }
LK_EMULATED __m512 maskz_loadu_ps(__mmask16 k, const void* p) { return load_some<F, float>(k, p); }
LK_EMULATED __m512i maskz_loadu_epi16(__mmask32 k, const void* p) {
  return load_some<I16, uint16_t>(k, p);
}
LK_EMULATED __m256i maskz_loadu_epi16_256(__mmask16 k, const void* p) {
  return load_some<H16, uint16_t>(k, p);
}
LK_EMULATED void mask_storeu_ps(void* p, __mmask16 k, __m512 a) { store_some<float>(p, k, F(a)); }
LK_EMULATED void mask_storeu_epi16_256(void* p, __mmask16 k, __m256i a) {
  store_some<uint16_t>(p, k, H16(a));
}

// Floating point, a lane at a time; subnormals as MXCSR says, as on the chip.
LK_EMULATED __m512 add_ps(__m512 a, __m512 b) {
  const F x = a, y = b;
  return each<F>([&](int i) { return x[i] + y[i]; });
}
LK_EMULATED __m512 sub_ps(__m512 a, __m512 b) {
  const F x = a, y = b;
  return each<F>([&](int i) { return x[i] - y[i]; });
}
LK_EMULATED __m512 mul_ps(__m512 a, __m512 b) {
  const F x = a, y = b;
  return each<F>([&](int i) { return x[i] * y[i]; });
}
LK_EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const F x = a, y = b, z = c;
  return each<F>([&](int i) { return __builtin_fmaf(x[i], y[i], z[i]); });
}
LK_EMULATED float reduce_add_ps(__m512 a) {
  F x = a;
  for (int width = 8; width; width /= 2) {
    for (int i = 0; i < width; i++) x[i] += x[i + width];
  }
  return x[0];
}
LK_EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  if (predicate != _CMP_UNORD_Q) std::abort();
  const F x = a, y = b;
  uint32_t mask = 0;
  for (int i = 0; i < 16; i++) mask |= uint32_t{std::isunordered(x[i], y[i])} << i;
  return static_cast<__mmask16>(mask);
}
// Category 0x20 alone: subnormal; with DAZ a subnormal counts as zero.
LK_EMULATED __mmask16 fpclass_ps_mask(__m512 a, int category) {
  if (category != 0x20) std::abort();
  const I32 x = (__m512i)a;
  const bool daz = _mm_getcsr() & 0x40;
  uint32_t mask = 0;
  for (int i = 0; i < 16; i++) {
    mask |= uint32_t{!daz && !(x[i] & 0x7f800000) && (x[i] & 0x7fffff)} << i;
  }
  return static_cast<__mmask16>(mask);
}

// Integers.
LK_EMULATED __m512i add_epi32(__m512i a, __m512i b) {
  const I32 x = a, y = b;
  return each<I32>([&](int i) { return x[i] + y[i]; });
}
LK_EMULATED __m512i add_epi64(__m512i a, __m512i b) {
  const I64 x = a, y = b;
  return each<I64>([&](int i) { return x[i] + y[i]; });
}
LK_EMULATED __m512i mul_epu32(__m512i a, __m512i b) {
  const I64 x = a, y = b;
  return each<I64>([&](int i) { return (x[i] & 0xffffffff) * (y[i] & 0xffffffff); });
}
LK_EMULATED __m512i and_si512(__m512i a, __m512i b) {
  const I64 x = a, y = b;
  return each<I64>([&](int i) { return x[i] & y[i]; });
}
LK_EMULATED __m512i slli_epi32(__m512i a, unsigned n) {
  const I32 x = a;
  return each<I32>([&](int i) { return n > 31 ? 0 : x[i] << n; });
}
LK_EMULATED __m512i srli_epi32(__m512i a, unsigned n) {
  const I32 x = a;
  return each<I32>([&](int i) { return n > 31 ? 0 : x[i] >> n; });
}
LK_EMULATED __m512i srli_epi64(__m512i a, unsigned n) {
  const I64 x = a;
  return each<I64>([&](int i) { return n > 63 ? 0 : x[i] >> n; });
}
// Bit i of the result is bit (a_i, b_i, c_i) of the table.
LK_EMULATED __m512i ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
  const I64 x = a, y = b, z = c;
  return each<I64>([&](int i) {
    uint64_t out = 0;
    for (int row = 0; row < 8; row++) {
      if (!(table >> row & 1)) continue;
      out |= (row & 4 ? x[i] : ~x[i]) & (row & 2 ? y[i] : ~y[i]) & (row & 1 ? z[i] : ~z[i]);
    }
    return out;
  });
}
LK_EMULATED __mmask32 cmpge_epu16_mask(__m512i a, __m512i b) {
  const I16 x = a, y = b;
  uint32_t mask = 0;
  for (int i = 0; i < 32; i++) mask |= uint32_t{x[i] >= y[i]} << i;
  return mask;
}
LK_EMULATED __mmask16 movepi32_mask(__m512i a) {
  const I32 x = a;
  uint32_t mask = 0;
  for (int i = 0; i < 16; i++) mask |= (x[i] >> 31) << i;
  return static_cast<__mmask16>(mask);
}

// Selection and movement of lanes.
LK_EMULATED __m512 maskz_mov_ps(__mmask16 k, __m512 a) {
  const F x = a;
  return each<F>([&](int i) { return k >> i & 1 ? x[i] : 0.0f; });
}
LK_EMULATED __m512i maskz_mov_epi16(__mmask32 k, __m512i a) {
  const I16 x = a;
  return each<I16>([&](int i) { return static_cast<uint16_t>(k >> i & 1 ? x[i] : 0); });
}
LK_EMULATED __m512i mask_or_epi32(__m512i other, __mmask16 k, __m512i a, __m512i b) {
  const I32 o = other, x = a, y = b;
  return each<I32>([&](int i) { return k >> i & 1 ? x[i] | y[i] : o[i]; });
}
LK_EMULATED __m512i maskz_compress_epi32(__mmask16 k, __m512i a) {
  const I32 x = a;
  I32 out = each<I32>([](int) { return 0u; });
  for (int i = 0, n = 0; i < 16; i++) {
    if (k >> i & 1) out[n++] = x[i];
  }
  return out;
}
// Of each 16 bytes: the lower or upper halves of a and b, lane by lane in turn.
template <class L>
inline L interleave(L a, L b, int upper) {
  constexpr int width = 16 * L::count / 64;
  return each<L>([&](int i) {
    const int from = i / width * width + upper * (width / 2) + i % width / 2;
    return i % 2 ? b[from] : a[from];
  });
}
LK_EMULATED __m512 unpacklo_ps(__m512 a, __m512 b) { return interleave<F>(a, b, 0); }
LK_EMULATED __m512 unpackhi_ps(__m512 a, __m512 b) { return interleave<F>(a, b, 1); }
LK_EMULATED __m512i unpacklo_epi16(__m512i a, __m512i b) { return interleave<I16>(a, b, 0); }
LK_EMULATED __m512i unpackhi_epi16(__m512i a, __m512i b) { return interleave<I16>(a, b, 1); }
LK_EMULATED __m512i unpacklo_epi64(__m512i a, __m512i b) { return interleave<I64>(a, b, 0); }
LK_EMULATED __m512i unpackhi_epi64(__m512i a, __m512i b) { return interleave<I64>(a, b, 1); }
LK_EMULATED __m512 shuffle_ps(__m512 a, __m512 b, int control) {
  const F x = a, y = b;
  return each<F>([&](int i) {
    const int from = i / 4 * 4 + (control >> i % 4 * 2 & 3);
    return i % 4 < 2 ? x[from] : y[from];
  });
}
LK_EMULATED __m512 shuffle_f32x4(__m512 a, __m512 b, int control) {
  const F x = a, y = b;
  return each<F>([&](int i) {
    const int from = (control >> i / 4 * 2 & 3) * 4 + i % 4;
    return i < 8 ? x[from] : y[from];
  });
}
LK_EMULATED __m512i mask_shuffle_epi32(__m512i other, __mmask16 k, __m512i a, int control) {
  const I32 o = other, x = a;
  return each<I32>(
      [&](int i) { return k >> i & 1 ? x[i / 4 * 4 + (control >> i % 4 * 2 & 3)] : o[i]; });
}
LK_EMULATED __m512i shuffle_epi32(__m512i a, int control) {
  return mask_shuffle_epi32(a, 0xffff, a, control);
}
LK_EMULATED __m512i permutex2var_epi64(__m512i a, __m512i index, __m512i b) {
  const I64 x = a, y = b, from = index;
  return each<I64>([&](int i) { return from[i] & 8 ? y[from[i] & 7] : x[from[i] & 7]; });
}

// Conversions.
LK_EMULATED __m512i cvtepu16_epi32(__m256i a) {
  const H16 x = a;
  return each<I32>([&](int i) { return uint32_t{x[i]}; });
}
LK_EMULATED __m256i cvtepi32_epi16(__m512i a) {
  const I32 x = a;
  return each<H16>([&](int i) { return static_cast<uint16_t>(x[i]); });
}
LK_EMULATED __m512 cvtph_ps(__m256i a) {
  const __m256 half[] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                         _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
  return loadu_ps(half);
}
LK_EMULATED __m256i cvtps_ph(__m512 a, int rounding) {
  if (rounding != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) std::abort();
  __m256 half[2];
  std::memcpy(half, &a, sizeof a);
  return _mm256_set_m128i(_mm256_cvtps_ph(half[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                          _mm256_cvtps_ph(half[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// bfloat16 instructions flush subnormals whatever MXCSR says, operands and results.
inline float flushed(float x) {
  const uint32_t u = float_bits(x);
  return u & 0x7f800000 ? x : bits_float(u & 0x80000000);
}
inline uint16_t bf16_of(float x) {
  const uint32_t u = float_bits(flushed(x));
  if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(u >> 16 | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
LK_EMULATED __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  const F x = high, y = low;
  return each<I16>([&](int i) { return bf16_of(i < 16 ? y[i] : x[i - 16]); });
}
LK_EMULATED __m512 dpbf16_ps(__m512 acc, __m512bh a, __m512bh b) {
  const I16 x = (__m512i)a, y = (__m512i)b;
  const F c = acc;
  return each<F>([&](int i) {
    const auto term = [&](int j) {  // exact: two significands of 8 bits
      return flushed(bits_float(uint32_t{x[j]} << 16)) * flushed(bits_float(uint32_t{y[j]} << 16));
    };
    const float odd = flushed(flushed(c[i]) + flushed(term(2 * i + 1)));
    return flushed(odd + flushed(term(2 * i)));
  });
}

#undef LK_EMULATED

}  // namespace lora_kernels_emulate

#include "avx512_names.h"
