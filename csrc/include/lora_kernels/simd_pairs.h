// 32 bf16 lanes as 16 pairs, dotted into 16 float lanes, where the instruction set has that
// (LK_HAS_BF16_DOT); and the store of several vectors, which it makes quicker.
#pragma once

#include "lora_kernels/simd.h"

namespace lora_kernels {
namespace LK_ISA {

#if defined(__AVX512BF16__)
#define LK_HAS_BF16_DOT 1

struct vb {
  __m512i v;
};

LK_INLINE vb load_pairs(const bf16* p) { return {_mm512_loadu_si512(p)}; }
LK_INLINE vb load_pairs_n(const bf16* p, int n) {  // the first n of 32
  const __mmask32 m = n >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((1u << n) - 1u);
  return {_mm512_maskz_loadu_epi16(m, p)};
}
LK_INLINE void store_pairs(bf16* p, vb a) { _mm512_storeu_si512(p, a.v); }
LK_INLINE vb keep(vb a, uint32_t bits) { return {_mm512_maskz_mov_epi16(bits, a.v)}; }
LK_INLINE vb broadcast_pair(uint32_t pair) { return {_mm512_set1_epi32(static_cast<int>(pair))}; }
// Four pairs, in each quarter of the vector; the J-th of the four, everywhere.
LK_INLINE vb broadcast_four(const bf16* p) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
template <int J>
LK_INLINE vb pick_pair(vb four) {
  return {_mm512_shuffle_epi32(four.v, static_cast<_MM_PERM_ENUM>(J * 0x55))};
}
// acc[i] += a[2i] * b[2i] + a[2i + 1] * b[2i + 1]; subnormal operands count as zero.
LK_INLINE vf dot(vb a, vb b, vf acc) {
  return {
      _mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
// lo's 16 floats, then hi's, each rounded to bf16 in one instruction (subnormals become zero).
LK_INLINE vb narrow_pairs(vf lo, vf hi) {
  return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi.v, lo.v))};
}
// Pairs (a[i], b[i]) of two rows of 32: the first 16 pairs, then the last 16.
LK_INLINE void interleave(vb a, vb b, vb* first, vb* last) {
  const __m512i lo = _mm512_unpacklo_epi16(a.v, b.v);
  const __m512i hi = _mm512_unpackhi_epi16(a.v, b.v);
  const __m512i head = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i tail = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  first->v = _mm512_permutex2var_epi64(lo, head, hi);
  last->v = _mm512_permutex2var_epi64(lo, tail, hi);
}
LK_INLINE vf as_floats(vb a) { return {_mm512_castsi512_ps(a.v)}; }
LK_INLINE vb as_pairs(vf a) { return {_mm512_castps_si512(a.v)}; }
LK_INLINE bool has_subnormal(vf a) { return _mm512_fpclass_ps_mask(a.v, 0x20) != 0; }

#endif

// N vectors, rounded, one after the other.
template <class T, int N>
LK_INLINE void store_row(T* p, const vf (&v)[N]) {
  LK_UNROLL
  for (int i = 0; i < N; i++) store(p + i * kLanes, v[i]);
}
#if LK_HAS_BF16_DOT
// The rounding instruction takes subnormals for zero; vectors that hold one take the long way.
template <int N>
LK_INLINE void store_row(bf16* p, const vf (&v)[N]) {
  static_assert(N % 2 == 0, "vectors are rounded two at a time");
  LK_UNROLL
  for (int i = 0; i < N; i += 2) {
    if (__builtin_expect(has_subnormal(v[i]) || has_subnormal(v[i + 1]), 0)) {
      store(p + i * kLanes, v[i]);
      store(p + (i + 1) * kLanes, v[i + 1]);
    } else {
      store_pairs(p + i * kLanes, narrow_pairs(v[i], v[i + 1]));
    }
  }
}
#endif

}  // namespace LK_ISA
}  // namespace lora_kernels
