// The vector vocabulary of the CPU kernels: one 16-lane float vector `vf`, the same on every
// instruction set. Included by files that are compiled once per instruction set with
// -DLK_ISA=<name>; everything lives in namespace lora_kernels::LK_ISA.
//
//   AVX-512   one zmm          AVX2   two ymm          otherwise   four 4-lane vectors (GCC, Clang)
//
// Loads widen float, bf16 and f16 to float; stores round to nearest even and keep NaN a NaN. The
// `_n` forms touch only the first n of 16 lanes (0 <= n <= 16) and read the others as zero, so a
// tail never reads past the end. `keep(v, bits)` zeroes lanes by selection, never by a product: an
// Inf or NaN in a dropped lane is gone. Subnormals survive every conversion.
#pragma once

#include <cstdint>
#include <cstring>

#include "lora_kernels/scalar.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own intrinsics leave a don't-care operand unset and warn about it wherever they inline.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

#if defined(__clang__)
#define LK_UNROLL _Pragma("unroll")
#else
#define LK_UNROLL _Pragma("GCC unroll 16")
#endif

namespace lora_kernels {
namespace LK_ISA {

constexpr int kLanes = 16;

#if defined(__AVX512F__)

struct vf {
  __m512 v;
};

LK_INLINE __mmask16 lane_mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

LK_INLINE vf zero() { return {_mm512_setzero_ps()}; }
LK_INLINE vf broadcast(float x) { return {_mm512_set1_ps(x)}; }
LK_INLINE vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LK_INLINE vf add(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
LK_INLINE vf sub(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
LK_INLINE vf mul(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
LK_INLINE vf keep(vf a, uint32_t bits) {
  return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a.v)};
}
LK_INLINE float hsum(vf a) { return _mm512_reduce_add_ps(a.v); }

LK_INLINE __m512 widen_bf16(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
LK_INLINE __m256i narrow_bf16(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x00400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}

LK_INLINE vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
LK_INLINE vf load(const bf16* p) {
  return {widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
LK_INLINE vf load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
LK_INLINE vf load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(lane_mask(n), p)}; }
LK_INLINE vf load_n(const bf16* p, int n) {
  return {widen_bf16(_mm256_maskz_loadu_epi16(lane_mask(n), p))};
}
LK_INLINE vf load_n(const f16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane_mask(n), p))};
}

LK_INLINE __m256i narrow_f16(__m512 x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
LK_INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
LK_INLINE void store(bf16* p, vf a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a.v));
}
LK_INLINE void store(f16* p, vf a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a.v));
}
LK_INLINE void store_n(float* p, vf a, int n) { _mm512_mask_storeu_ps(p, lane_mask(n), a.v); }
LK_INLINE void store_n(bf16* p, vf a, int n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n), narrow_bf16(a.v));
}
LK_INLINE void store_n(f16* p, vf a, int n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n), narrow_f16(a.v));
}

// t[i][j] becomes t[j][i]: pairs, quads, then 128-bit quarters.
LK_INLINE void transpose16(vf t[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(t[i].v, t[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(t[i].v, t[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int j = 0; j < 4; j++) {
    const __m512 p = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88);
    const __m512 q = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const __m512 r = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 s = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    t[j].v = _mm512_shuffle_f32x4(p, r, 0x88);
    t[8 + j].v = _mm512_shuffle_f32x4(p, r, 0xdd);
    t[4 + j].v = _mm512_shuffle_f32x4(q, s, 0x88);
    t[12 + j].v = _mm512_shuffle_f32x4(q, s, 0xdd);
  }
}

// Lane i of the result is the sum of a[i]'s lanes: a 16-way transpose whose last step is an add.
LK_INLINE vf hsum16(const vf a[16]) {
  __m512 t[8], u[4];
  for (int i = 0; i < 8; i++) {
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v),
                         _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
  }
  for (int i = 0; i < 4; i++) {
    u[i] = _mm512_add_ps(_mm512_shuffle_ps(t[2 * i], t[2 * i + 1], 0x44),
                         _mm512_shuffle_ps(t[2 * i], t[2 * i + 1], 0xee));
  }
  const __m512 p =
      _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
  const __m512 q =
      _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd))};
}

#elif defined(__AVX2__)

struct vf {
  __m256 lo, hi;
};

LK_INLINE vf zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
LK_INLINE vf broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LK_INLINE vf fma(vf a, vf b, vf c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
LK_INLINE vf add(vf a, vf b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
LK_INLINE vf sub(vf a, vf b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
LK_INLINE vf mul(vf a, vf b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }

// All ones in lane i where bit i is set.
LK_INLINE __m256i bit_lanes(uint32_t bits) {
  const __m256i sel = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i b = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), sel);
  return _mm256_cmpeq_epi32(b, sel);
}
LK_INLINE vf keep(vf a, uint32_t bits) {
  return {_mm256_and_ps(a.lo, _mm256_castsi256_ps(bit_lanes(bits))),
          _mm256_and_ps(a.hi, _mm256_castsi256_ps(bit_lanes(bits >> 8)))};
}
LK_INLINE float hsum(vf a) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

LK_INLINE __m256 widen_bf16(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
LK_INLINE __m128i narrow_bf16(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256i w = _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, _mm256_castps_si256(nan)), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
}

LK_INLINE vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LK_INLINE vf load(const bf16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {widen_bf16(_mm_loadu_si128(q)), widen_bf16(_mm_loadu_si128(q + 1))};
}
LK_INLINE vf load(const f16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
LK_INLINE void store(float* p, vf a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
LK_INLINE void store(bf16* p, vf a) {
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, narrow_bf16(a.lo));
  _mm_storeu_si128(q + 1, narrow_bf16(a.hi));
}
LK_INLINE void store(f16* p, vf a) {
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

typedef float f4 __attribute__((vector_size(16)));
typedef uint32_t u4 __attribute__((vector_size(16)));

struct vf {
  f4 q[4];
};

LK_INLINE vf broadcast(float x) {
  vf r;
  for (int i = 0; i < 4; i++) r.q[i] = f4{x, x, x, x};
  return r;
}
LK_INLINE vf zero() { return broadcast(0.0f); }
LK_INLINE vf fma(vf a, vf b, vf c) {
  vf r;
  for (int i = 0; i < 4; i++) r.q[i] = a.q[i] * b.q[i] + c.q[i];
  return r;
}
LK_INLINE vf add(vf a, vf b) {
  vf r;
  for (int i = 0; i < 4; i++) r.q[i] = a.q[i] + b.q[i];
  return r;
}
LK_INLINE vf sub(vf a, vf b) {
  vf r;
  for (int i = 0; i < 4; i++) r.q[i] = a.q[i] - b.q[i];
  return r;
}
LK_INLINE vf mul(vf a, vf b) {
  vf r;
  for (int i = 0; i < 4; i++) r.q[i] = a.q[i] * b.q[i];
  return r;
}
LK_INLINE vf keep(vf a, uint32_t bits) {
  vf r;
  for (int i = 0; i < 4; i++) {
    const u4 sel = {1u << (4 * i), 2u << (4 * i), 4u << (4 * i), 8u << (4 * i)};
    const u4 on = (u4)((u4{bits, bits, bits, bits} & sel) != 0u);
    r.q[i] = (f4)((u4)a.q[i] & on);
  }
  return r;
}
LK_INLINE float hsum(vf a) {
  const f4 s = (a.q[0] + a.q[1]) + (a.q[2] + a.q[3]);
  return (s[0] + s[2]) + (s[1] + s[3]);
}

template <class T>
LK_INLINE vf load(const T* p) {
  vf r;
  for (int i = 0; i < 16; i++) r.q[i / 4][i % 4] = to_float(p[i]);
  return r;
}
template <class T>
LK_INLINE void store(T* p, vf a) {
  for (int i = 0; i < 16; i++) p[i] = from_float<T>(a.q[i / 4][i % 4]);
}

#endif

#if !defined(__AVX512F__)

// Tails through a zeroed buffer: never a read or a write past lane n.
template <class T>
LK_INLINE vf load_n(const T* p, int n) {
  T buf[16] = {};
  std::memcpy(static_cast<void*>(buf), p, n * sizeof(T));
  return load(buf);
}
template <class T>
LK_INLINE void store_n(T* p, vf a, int n) {
  T buf[16];
  store(buf, a);
  std::memcpy(static_cast<void*>(p), buf, n * sizeof(T));
}

#if defined(__AVX2__)

// Floats by masked moves, which touch nothing past lane n either.
LK_INLINE const __m256i* first_lanes(int n, int from) {
  alignas(32) static constexpr int32_t kLanesOn[32] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                       -1, -1, -1, -1, -1, -1, -1, -1};
  return reinterpret_cast<const __m256i*>(kLanesOn + 16 - n + from);
}
LK_INLINE vf load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, _mm256_loadu_si256(first_lanes(n, 0))),
          _mm256_maskload_ps(p + 8, _mm256_loadu_si256(first_lanes(n, 8)))};
}
LK_INLINE void store_n(float* p, vf a, int n) {
  _mm256_maskstore_ps(p, _mm256_loadu_si256(first_lanes(n, 0)), a.lo);
  _mm256_maskstore_ps(p + 8, _mm256_loadu_si256(first_lanes(n, 8)), a.hi);
}

// Lane i of the result is the sum of a[i]'s lanes.
LK_INLINE __m256 hsum8(const vf a[8]) {
  __m256 t[4];
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_hadd_ps(_mm256_add_ps(a[2 * i].lo, a[2 * i].hi),
                          _mm256_add_ps(a[2 * i + 1].lo, a[2 * i + 1].hi));
  }
  const __m256 p = _mm256_hadd_ps(t[0], t[1]), q = _mm256_hadd_ps(t[2], t[3]);
  return _mm256_add_ps(_mm256_permute2f128_ps(p, q, 0x20), _mm256_permute2f128_ps(p, q, 0x31));
}
LK_INLINE vf hsum16(const vf a[16]) { return {hsum8(a), hsum8(a + 8)}; }

LK_INLINE void transpose8(__m256 t[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(t[i], t[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(t[i], t[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int j = 0; j < 4; j++) {
    t[j] = _mm256_permute2f128_ps(b[j], b[j + 4], 0x20);
    t[j + 4] = _mm256_permute2f128_ps(b[j], b[j + 4], 0x31);
  }
}

// t[i][j] becomes t[j][i], as four blocks of 8 x 8.
LK_INLINE void transpose16(vf t[16]) {
  __m256 a[8], b[8], c[8], d[8];
  for (int i = 0; i < 8; i++) {
    a[i] = t[i].lo;
    b[i] = t[i].hi;
    c[i] = t[i + 8].lo;
    d[i] = t[i + 8].hi;
  }
  transpose8(a);
  transpose8(b);
  transpose8(c);
  transpose8(d);
  for (int i = 0; i < 8; i++) {
    t[i] = {a[i], c[i]};
    t[i + 8] = {b[i], d[i]};
  }
}

#else

LK_INLINE vf hsum16(const vf a[16]) {
  float s[16];
  for (int i = 0; i < 16; i++) s[i] = hsum(a[i]);
  return load(s);
}

LK_INLINE void transpose16(vf t[16]) {
  float in[16][16], out[16][16];
  for (int i = 0; i < 16; i++) store(in[i], t[i]);
  for (int i = 0; i < 16; i++) {
    for (int j = 0; j < 16; j++) out[j][i] = in[i][j];
  }
  for (int i = 0; i < 16; i++) t[i] = load(out[i]);
}

#endif

#endif

}  // namespace LK_ISA
}  // namespace lora_kernels
