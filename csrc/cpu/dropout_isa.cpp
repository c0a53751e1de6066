// Dropout keep bits, a block of Philox counters at a time.
//
// Byte g of the mask holds the eight keep bits of group g, and groups are numbered row by row, so a
// range of rows is one run of consecutive counters. A vector holds one counter per 64-bit lane, its
// four words in the low halves of four vectors; vpmuludq reads only low halves, so the high halves
// may hold rubbish between rounds and a round costs two products, two shifts and two three-way
// XORs. After ten rounds words 0, 1 and 2, 3 are zipped into 64-bit lanes of four 16-bit draws,
// lanes of one counter are brought side by side, and one compare per 64 bytes gives keep bits that
// are already in column order. Four vectors run interleaved to cover the multiplier's latency.
#include <cstring>

#include "lora_kernels/philox.h"
#include "lora_kernels/simd.h"

namespace lora_kernels {
namespace LK_ISA {

// out[0, count): bytes of groups first .. first + count.
void dropout_groups(uint8_t* out, uint64_t first, int64_t count, uint64_t seed, uint32_t threshold);

namespace {

#if defined(__AVX512F__)

using vi = __m512i;
constexpr int kCounters = 8;
LK_INLINE vi splat(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
// Counters in lane order 0 4 1 5 2 6 3 7: the unpacks below then yield 0-3 and 4-7 in order.
LK_INLINE vi counters(uint64_t g) {
  return _mm512_add_epi64(splat(g), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
}
LK_INLINE vi mul(vi a, vi b) { return _mm512_mul_epu32(a, b); }
// A shuffle leaves the port of the products free, where a shift would not.
LK_INLINE vi high(vi a) { return _mm512_shuffle_epi32(a, static_cast<_MM_PERM_ENUM>(0xf5)); }
LK_INLINE vi xor3(vi a, vi b, vi c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// Lane i: low half of a, then low half of b.
LK_INLINE vi zip(vi a, vi b) {
  return _mm512_mask_shuffle_epi32(a, 0xaaaa, b, static_cast<_MM_PERM_ENUM>(0xa0));
}
LK_INLINE void keep_bits(uint8_t* out, vi w01, vi w23, uint32_t threshold) {
  const vi t = _mm512_set1_epi16(static_cast<int16_t>(threshold));
  const uint32_t lo = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(w01, w23), t);
  const uint32_t hi = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(w01, w23), t);
  std::memcpy(out, &lo, 4);
  std::memcpy(out + 4, &hi, 4);
}

#elif defined(__AVX2__)

using vi = __m256i;
constexpr int kCounters = 4;
LK_INLINE vi splat(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
LK_INLINE vi counters(uint64_t g) {
  return _mm256_add_epi64(splat(g), _mm256_setr_epi64x(0, 1, 2, 3));
}
LK_INLINE vi mul(vi a, vi b) { return _mm256_mul_epu32(a, b); }
LK_INLINE vi high(vi a) { return _mm256_srli_epi64(a, 32); }
LK_INLINE vi xor3(vi a, vi b, vi c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
LK_INLINE vi zip(vi a, vi b) { return _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa); }
LK_INLINE void keep_bits(uint8_t* out, vi w01, vi w23, uint32_t threshold) {
  const vi t = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  const vi a = _mm256_unpacklo_epi64(w01, w23), b = _mm256_unpackhi_epi64(w01, w23);
  const vi ka = _mm256_cmpeq_epi16(_mm256_max_epu16(a, t), a);
  const vi kb = _mm256_cmpeq_epi16(_mm256_max_epu16(b, t), b);
  const uint32_t bits = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(ka, kb)));
  std::memcpy(out, &bits, 4);
}

#endif

#if defined(__AVX512F__) || defined(__AVX2__)

constexpr int kUnroll = 4;
constexpr int kBlock = kUnroll * kCounters;

// out[0, kBlock): bytes of groups g .. g + kBlock.
LK_INLINE void block(uint8_t* out, uint64_t g, uint64_t seed, uint32_t threshold) {
  const vi m0 = splat(kPhiloxM0), m1 = splat(kPhiloxM1);
  vi c0[kUnroll], c1[kUnroll], c2[kUnroll], c3[kUnroll];
  for (int u = 0; u < kUnroll; ++u) {
    c0[u] = counters(g + static_cast<uint64_t>(u * kCounters));
    c1[u] = high(c0[u]);
    c2[u] = c3[u] = splat(0);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const vi key0 = splat(k0), key1 = splat(k1);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const vi p0 = mul(c0[u], m0), p1 = mul(c2[u], m1);
      c0[u] = xor3(high(p1), c1[u], key0);
      c1[u] = p1;
      c2[u] = xor3(high(p0), c3[u], key1);
      c3[u] = p0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  for (int u = 0; u < kUnroll; ++u) {
    keep_bits(out + u * kCounters, zip(c0[u], c1[u]), zip(c2[u], c3[u]), threshold);
  }
}

#else

constexpr int kBlock = 1;

LK_INLINE void block(uint8_t* out, uint64_t g, uint64_t seed, uint32_t threshold) {
  uint32_t w[4];
  philox(g, seed, w);
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    bits |= static_cast<uint32_t>((w[i] & 0xffffu) >= threshold) << (2 * i);
    bits |= static_cast<uint32_t>((w[i] >> 16) >= threshold) << (2 * i + 1);
  }
  *out = static_cast<uint8_t>(bits);
}

#endif

}  // namespace

void dropout_groups(uint8_t* out, uint64_t first, int64_t count, uint64_t seed,
                    uint32_t threshold) {
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    block(out + i, first + static_cast<uint64_t>(i), seed, threshold);
  }
  if (i < count) {
    uint8_t tail[kBlock];
    block(tail, first + static_cast<uint64_t>(i), seed, threshold);
    std::memcpy(out + i, tail, static_cast<size_t>(count - i));
  }
}

}  // namespace LK_ISA
}  // namespace lora_kernels
