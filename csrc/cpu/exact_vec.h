// Vectors and number formats of the exact merge, at the width of the instruction set.
//
// GCC's generic vectors: kN lanes of float or 32-bit integers. A `key` orders the values of a dtype
// as integers: neighbours differ by one, -0 (key -1) lies before +0 (key 0), Inf is next to the
// largest finite value. `Num<T>` gives, for each dtype, its bits and keys, their float32 values,
// and a float32 rounded to nearest even; `nearest` is that as a float32, `narrow` its bits. No
// product here or in the codec feeds a sum that could be contracted, but for exact ones.
#pragma once

#include "lora_kernels/simd.h"

namespace lora_kernels {
namespace LK_ISA {

#if defined(__AVX512F__)
constexpr int kN = 16;
#elif defined(__AVX2__)
constexpr int kN = 8;
#else
constexpr int kN = 4;
#endif
constexpr int kSub = 16 / kN;

typedef float fv __attribute__((vector_size(4 * kN)));
typedef int32_t iv __attribute__((vector_size(4 * kN)));
typedef uint32_t uv __attribute__((vector_size(4 * kN)));
typedef uint16_t hv __attribute__((vector_size(2 * kN)));

template <class V, class T>
LK_INLINE V read(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
LK_INLINE void write(T* p, V v) {
  std::memcpy(static_cast<void*>(p), &v, sizeof(V));
}
#define LK_INLINED __attribute__((always_inline))  // for a lambda

LK_INLINE fv splat(float x) { return x - fv{}; }  // x - 0 is x, of -0 too
LK_INLINE iv isplat(int32_t x) { return iv{} + x; }
LK_INLINE iv pick(iv mask, iv yes, iv no) { return (yes & mask) | (no & ~mask); }
LK_INLINE iv smaller(iv a, iv b) { return a < b ? a : b; }
LK_INLINE iv larger(iv a, iv b) { return a > b ? a : b; }

// a * b + c, rounded once.
LK_INLINE fv fused(fv a, fv b, fv c) {
#if defined(__AVX512F__)
  return (fv)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (fv)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  fv r;
  for (int i = 0; i < kN; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#endif
}

LK_INLINE iv iota() {
  alignas(64) static const int32_t kIota[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return read<iv>(kIota);
}

// Bit i is set where lane i of a comparison is.
LK_INLINE uint32_t lanes(iv mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kN; i++) bits |= (static_cast<uint32_t>(mask[i]) >> 31) << i;
  return bits;
#endif
}
constexpr uint32_t kAllLanes = (1u << kN) - 1u;
// All ones in the lanes where bits are set.
LK_INLINE iv lane_set(uint32_t bits) {
  return -((isplat(static_cast<int32_t>(bits)) >> iota()) & 1);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each set of lanes their numbers, one a byte, side by side.
struct LaneLists {
  uint64_t of[256];
  constexpr LaneLists() : of() {
    for (int bits = 0; bits < 256; ++bits) {
      int n = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (bits >> lane & 1) of[bits] |= static_cast<uint64_t>(lane) << (8 * n++);
      }
    }
  }
};
constexpr LaneLists kLaneLists;
#endif

// Writes the numbers of the lanes where bits are set, from `first` on, side by side; what comes
// after them, up to kN, is arbitrary. No branches: which lanes they are can not be predicted.
LK_INLINE void write_lanes(uint16_t* to, uint32_t bits, int64_t first) {
#if defined(__AVX512F__)
  const iv all = iota() + static_cast<int32_t>(first);
  const __m512i some = _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), (__m512i)all);
  write(to, (hv)_mm512_cvtepi32_epi16(some));
#elif defined(__AVX2__)
  const __m128i lists = _mm_cvtsi64_si128(static_cast<long long>(kLaneLists.of[bits & 255u]));
  write(to, (hv)_mm_cvtepu8_epi16(lists) + static_cast<uint16_t>(first));
#else
  for (; bits != 0; bits &= bits - 1) {
    *to++ = static_cast<uint16_t>(first + __builtin_ctz(bits));
  }
#endif
}

// bits of from[at[lane]]. One by one: a gather is slower where it is not one of 16 lanes.
template <class T>
LK_INLINE uv take(const T* from, const uint16_t* at) {
  uint32_t r[kN];
#pragma GCC unroll 16
  for (int i = 0; i < kN; i++) {
    if constexpr (sizeof(T) == 4) r[i] = float_bits(from[at[i]]);
    if constexpr (sizeof(T) == 2) r[i] = from[at[i]].bits;
  }
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (uv)_mm256_setr_epi32(r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]);
#else
  return read<uv>(r);
#endif
}

// Of each lane, exact for values below 2^24.
LK_INLINE iv bit_widths(uv x) {
  const iv width = ((iv) __builtin_convertvector((iv)x, fv) >> 23) - 126;
  return width & (width > 0);
}

#if defined(__AVX2__)
#define LK_PACKS_LANES 1
// Eight lanes with `width` bits each, below 2^24, side by side in one word of up to 56 bits. The
// functions below take the eights of a vector one by one.
constexpr int kEights = kN / 8;

LK_INLINE __m256i eight(iv v, int part) {
#if defined(__AVX512F__)
  return part == 0 ? _mm512_castsi512_si256((__m512i)v) : _mm512_extracti64x4_epi64((__m512i)v, 1);
#else
  (void)part;
  return (__m256i)v;
#endif
}

// Where each lane's bits begin.
LK_INLINE __m256i lane_offsets(__m256i width, int* total) {
  __m256i end = _mm256_add_epi32(width, _mm256_slli_si256(width, 4));
  end = _mm256_add_epi32(end, _mm256_slli_si256(end, 8));
  const __m256i low = _mm256_permute2x128_si256(end, end, 0x08);  // 0 | the lower half
  end = _mm256_add_epi32(end, _mm256_shuffle_epi32(low, 0xff));
  *total = _mm256_extract_epi32(end, 7);
  return _mm256_sub_epi32(end, width);
}

LK_INLINE uint64_t pack_lanes(__m256i v, __m256i offset) {
  const __m256i lo = _mm256_sllv_epi64(_mm256_cvtepu32_epi64(_mm256_castsi256_si128(v)),
                                       _mm256_cvtepu32_epi64(_mm256_castsi256_si128(offset)));
  const __m256i hi = _mm256_sllv_epi64(_mm256_cvtepu32_epi64(_mm256_extracti128_si256(v, 1)),
                                       _mm256_cvtepu32_epi64(_mm256_extracti128_si256(offset, 1)));
  const __m256i four = _mm256_or_si256(lo, hi);
  const __m128i two = _mm_or_si128(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(two)) |
         static_cast<uint64_t>(_mm_extract_epi64(two, 1));
}

LK_INLINE __m256i unpack_lanes(uint64_t word, __m256i width, __m256i offset) {
  const __m256i all = _mm256_set1_epi64x(static_cast<long long>(word));
  const __m256i lo = _mm256_srlv_epi64(all, _mm256_cvtepu32_epi64(_mm256_castsi256_si128(offset)));
  const __m256i hi =
      _mm256_srlv_epi64(all, _mm256_cvtepu32_epi64(_mm256_extracti128_si256(offset, 1)));
  const __m256i even = _mm256_castps_si256(
      _mm256_shuffle_ps(_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi), 0x88));
  const __m256i above = _mm256_sllv_epi32(_mm256_set1_epi32(-1), width);
  return _mm256_andnot_si256(above, _mm256_permute4x64_epi64(even, 0xd8));
}
#endif

// kN 16-bit values, as integers.
LK_INLINE uv load_u16(const void* p) {
  const hv h = read<hv>(static_cast<const uint16_t*>(p));
#if defined(__AVX512F__)
  return (uv)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (uv)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, uv);
#endif
}
// Of values that fit.
LK_INLINE hv narrow_u16(uv v) {
#if defined(__AVX512F__)
  return (hv)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  const __m256i x = (__m256i)v;
  return (hv)_mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
#else
  return __builtin_convertvector(v, hv);
#endif
}

template <class T>
struct Num;

template <>
struct Num<float> {
  static constexpr int32_t kInf = 0x7f800000;      // key of Inf; -kInf - 1 is that of -Inf
  static constexpr uint32_t kTooBig = 0x7f800000;  // magnitude bits of a float32 that rounds to Inf
  static constexpr int kKeyBits = 32;
  static constexpr int32_t kStep = 1;  // between neighbours, in float32 bits
  static constexpr bool kEven = true;  // of all, not of normal numbers only
  static LK_INLINE uv load(const float* p) { return read<uv>(p); }
  static LK_INLINE void store(float* p, uv bits) { write(p, bits); }
  static LK_INLINE fv widen(uv bits) { return (fv)bits; }
  static LK_INLINE uv round(fv u) { return (uv)u; }
  static LK_INLINE fv nearest(fv u) { return u; }
  static LK_INLINE uv narrow(fv w) { return (uv)w; }
  static LK_INLINE iv key(uv bits) { return (iv)bits ^ (((iv)bits >> 31) & 0x7fffffff); }
  static LK_INLINE uv bits(iv key) { return (uv)(key ^ ((key >> 31) & 0x7fffffff)); }
};

template <>
struct Num<bf16> {
  static constexpr int32_t kInf = 0x7f80;
  static constexpr uint32_t kTooBig = 0x7f7f8000;
  static constexpr int kKeyBits = 16;
  static constexpr int32_t kStep = 1 << 16;
  static constexpr bool kEven = true;
  static LK_INLINE uv load(const bf16* p) { return load_u16(p); }
  static LK_INLINE void store(bf16* p, uv bits) { write(p, narrow_u16(bits)); }
  static LK_INLINE fv widen(uv bits) { return (fv)(bits << 16); }
  static LK_INLINE uv round(fv u) {
    const uv b = (uv)u;
    return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  }
  static LK_INLINE fv nearest(fv u) { return widen(round(u)); }
  static LK_INLINE uv narrow(fv w) { return (uv)w >> 16; }
  static LK_INLINE iv key(uv bits) {
    const iv s = (iv)(bits << 16);
    return (s >> 16) ^ ((s >> 31) & 0x7fff);
  }
  static LK_INLINE uv bits(iv key) { return (uv)((key ^ ((key >> 31) & 0x7fff)) & 0xffff); }
};

template <>
struct Num<f16> {
  static constexpr int32_t kInf = 0x7c00;
  static constexpr uint32_t kTooBig = 0x477ff000;  // 65520
  static constexpr int kKeyBits = 16;
  static constexpr int32_t kStep = 1 << 13;
  static constexpr bool kEven = false;
  static LK_INLINE uv load(const f16* p) { return load_u16(p); }
  static LK_INLINE void store(f16* p, uv bits) { write(p, narrow_u16(bits)); }
  static LK_INLINE fv widen(uv bits) {
    const hv h = narrow_u16(bits);
#if defined(__AVX512F__)
    return (fv)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
    return (fv)_mm256_cvtph_ps((__m128i)h);
#else
    fv r;
    for (int i = 0; i < kN; i++) r[i] = to_float(f16{h[i]});
    return r;
#endif
  }
  static LK_INLINE uv round(fv u) {
#if defined(__AVX512F__)
    return (uv)_mm512_cvtepu16_epi32(
        _mm512_cvtps_ph((__m512)u, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
    return (uv)_mm256_cvtepu16_epi32(
        _mm256_cvtps_ph((__m256)u, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    uv r;
    for (int i = 0; i < kN; i++) r[i] = from_float<f16>(u[i]).bits;
    return r;
#endif
  }
  static LK_INLINE iv key(uv bits) { return Num<bf16>::key(bits); }
  static LK_INLINE uv bits(iv key) { return Num<bf16>::bits(key); }
};

template <class T>
LK_INLINE fv value(iv key) {
  return Num<T>::widen(Num<T>::bits(key));
}
template <class T>
LK_INLINE iv round_key(fv u) {
  return Num<T>::key(Num<T>::round(u));
}

// The merged key of the weight with key k.
template <class T>
LK_INLINE iv merged(iv k, fv acc) {
  return round_key<T>(value<T>(k) + acc);
}

LK_INLINE iv magnitude(fv x) { return (iv)((uv)x & 0x7fffffffu); }

// A cheap proof, lane by lane, that w is the only weight that merges to m with this update
// (u = fl32(w + acc)). Let 2^E <= |m| and h the spacing of T there (E and h are those of the
// smallest normal number where m is below it). Both neighbours of w are at least h away where |w|
// is more than 2^E, or not zero if m is small. The bits of a float32 are ordered as its values
// are, and kStep of them make a spacing: where u is within 0.4995 of that of m (below a power of
// two the spacing halves, and with it what a bit is worth), u rounds to m and a neighbour's sum,
// h away but for two float32 roundings of at most 2^-13 h, does not.
template <class T>
LK_INLINE iv surely_unique(fv w, fv m, fv, fv u) {
  constexpr int32_t kNear = Num<T>::kStep / 10000 * 4995 + Num<T>::kStep % 10000 * 4995 / 10000;
  const iv wide = magnitude(w) > ((iv)m & 0x7f800000);
  return wide & (iv)((uv)((iv)u - (iv)m + kNear) <= static_cast<uint32_t>(2 * kNear));
}
// float32: u must be m, and the error of the sum w + acc, exact by Dekker's two-sum where |w| is
// not below |acc|, less than h / 2: two neighbours that are h apart can only meet at a tie.
template <>
LK_INLINE iv surely_unique<float>(fv w, fv m, fv acc, fv u) {
  const iv exponent = (iv)m & 0x7f800000;
  const iv wide = magnitude(w) > larger(exponent, magnitude(acc));
  const iv error = magnitude(acc - (u - w));
  return wide & (u == m) & (error < exponent - (24 << 23));
}

}  // namespace LK_ISA
}  // namespace lora_kernels
