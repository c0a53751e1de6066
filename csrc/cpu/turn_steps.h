// The steps of the turned form's sums (linear_turn_isa.cpp): one number of k as floats, or a pair
// of them for the bf16 dot instruction. A step of x is a vector of a panel; a step of w is
// broadcast from where w lies.
#pragma once

#include <type_traits>

#include "linear_jobs.h"
#include "lora_kernels/simd_pairs.h"

namespace lora_kernels {
namespace LK_ISA {

constexpr int64_t kBlock = kTurnBlock;

// What both have: W, the type of w; kSize, numbers of k in a step; wide(V), rows of w that meet V
// panels at a time, as the registers allow; kHoldsX, whether these hold a step of x while rows of w
// come, or the other way round; kLine, steps between two calls of fetch(); a Row of w and the
// Buffer that it may need; crowded(), whether rows of w so far apart crowd into few sets of L1.
template <class T>
struct Single {
  using W = T;
  using V = vf;
  using Row = const float*;
  struct Buffer {
    float wide[kBlock];
  };
  static constexpr bool kInPlace = std::is_same<T, float>::value;
  static constexpr int64_t kSize = 1, kLine = kInPlace ? 16 : kBlock;
#if defined(__AVX512F__)
  static constexpr bool kHoldsX = true;
  static constexpr int wide(int V) { return V == 1 ? 16 : 24 / V; }
#else
  static constexpr bool kHoldsX = false;
  static constexpr int wide(int V) { return 6 / V; }
#endif

  static LK_INLINE bool crowded(int64_t) { return false; }
  static LK_INLINE int64_t steps(int64_t K) { return K; }
  static LK_INLINE V vec(const float* p) { return load(p); }
  static LK_INLINE V bcast(Row row, int64_t step) { return broadcast(row[step]); }
  static LK_INLINE vf mac(V x, V w, vf acc) { return fma(x, w, acc); }
  template <int NR>
  static LK_INLINE int64_t add_fours(const float*, const Row*, int64_t, vf (&)[NR][1]) {
    return 0;
  }

  static LK_INLINE Row row(const float* w, int64_t, Buffer&) { return w; }
  template <class TW>
  static LK_INLINE Row row(const TW* w, int64_t count, Buffer& buffer) {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) store(buffer.wide + k, load(w + k));
    for (; k < count; k++) buffer.wide[k] = to_float(w[k]);
    return buffer.wide;
  }
  static LK_INLINE Row last(Row row, Buffer&) { return row; }
  static LK_INLINE void fetch(Row row, int64_t ahead) {
    if (kInPlace) __builtin_prefetch(row + ahead);
  }

  // The next `count` <= 16 numbers of `rows` <= 16 rows of x, `scale` times each; the steps in t.
  template <class TX>
  static LK_INLINE int take(const TX* x, int64_t stride, int rows, int count, float scale,
                            vf (&t)[16]) {
    const vf s = broadcast(scale);
    for (int i = 0; i < 16; i++) {
      const TX* from = x + i * stride;
      t[i] = i >= rows ? zero() : mul(s, count == 16 ? load(from) : load_n(from, count));
    }
    return count;
  }
};

template <class T>
struct StepsOf {
  using type = Single<T>;
};

#if LK_HAS_BF16_DOT
struct Pair {
  using W = bf16;
  using V = vb;
  using Row = const bf16*;
  struct Buffer {
    bf16 pair[2];
  };
  static constexpr int64_t kSize = 2, kLine = 16;
  static constexpr bool kHoldsX = true;

  static constexpr int wide(int V) { return V == 1 ? 16 : 24 / V; }
  // Whole pages apart, rows share a set: 16 of them cost Zen 4 a third more than eight and eight.
  // Zen 5, with wider sets, has not been measured so.
  static LK_INLINE bool crowded(int64_t stride) { return stride * 2 % 4096 == 0 && !is_zen5(); }
  static LK_INLINE int64_t steps(int64_t K) { return (K + 1) / 2; }
  static LK_INLINE V vec(const float* p) { return as_pairs(load(p)); }
  static LK_INLINE V bcast(Row row, int64_t step) {
    uint32_t pair;
    std::memcpy(&pair, row + 2 * step, 4);
    return broadcast_pair(pair);
  }
  static LK_INLINE vf mac(V x, V w, vf acc) { return dot(x, w, acc); }

  // acc[n] += one panel times rows of w, four steps at a time; how many were taken. One panel alone
  // would have a broadcast for each product, and only half as many can be loaded: every other row
  // loads four pairs at once and shuffles them instead.
  template <int NR>
  static LK_INLINE int64_t add_fours(const float* panel, const Row* w, int64_t steps,
                                     vf (&acc)[NR][1]) {
    int64_t k = 0;
    for (; k + 4 <= steps; k += 4, panel += 4 * kLanes) {
      const V x0 = vec(panel), x1 = vec(panel + kLanes), x2 = vec(panel + 2 * kLanes),
              x3 = vec(panel + 3 * kLanes);
      LK_UNROLL
      for (int n = 0; n < NR; n++) {
        if (n % 2 == 0) {
          acc[n][0] = dot(x0, bcast(w[n], k), acc[n][0]);
          acc[n][0] = dot(x1, bcast(w[n], k + 1), acc[n][0]);
          acc[n][0] = dot(x2, bcast(w[n], k + 2), acc[n][0]);
          acc[n][0] = dot(x3, bcast(w[n], k + 3), acc[n][0]);
        } else {
          const V four = broadcast_four(w[n] + 2 * k);
          acc[n][0] = dot(x0, pick_pair<0>(four), acc[n][0]);
          acc[n][0] = dot(x1, pick_pair<1>(four), acc[n][0]);
          acc[n][0] = dot(x2, pick_pair<2>(four), acc[n][0]);
          acc[n][0] = dot(x3, pick_pair<3>(four), acc[n][0]);
        }
      }
    }
    return k;
  }

  static LK_INLINE Row row(const bf16* w, int64_t, Buffer&) { return w; }
  // An odd number at the end is paired with zero: what lies after it in memory may be no number.
  static LK_INLINE Row last(Row row, Buffer& buffer) {
    buffer.pair[0] = *row;
    buffer.pair[1] = from_float<bf16>(0.0f);
    return buffer.pair;
  }
  static LK_INLINE void fetch(Row row, int64_t ahead) { __builtin_prefetch(row + ahead); }

  // The next `count` <= 32 numbers, as pairs; only floats are scaled, and rounded.
  static LK_INLINE int take(const bf16* x, int64_t stride, int rows, int count, float,
                            vf (&t)[16]) {
    for (int i = 0; i < 16; i++) {
      t[i] = i < rows ? as_floats(load_pairs_n(x + i * stride, count)) : zero();
    }
    return (count + 1) / 2;
  }
  static LK_INLINE int take(const float* x, int64_t stride, int rows, int count, float scale,
                            vf (&t)[16]) {
    const vf s = broadcast(scale);
    for (int i = 0; i < 16; i++) {
      const float* from = x + i * stride;
      const vf lo = i < rows ? load_n(from, clip(count, kLanes)) : zero();
      const vf hi = i < rows && count > kLanes ? load_n(from + kLanes, count - kLanes) : zero();
      t[i] = as_floats(narrow_pairs(mul(s, lo), mul(s, hi)));
    }
    return (count + 1) / 2;
  }
};

template <>
struct StepsOf<bf16> {
  using type = Pair;
};
#endif

template <class T>
using Steps = typename StepsOf<T>::type;

}  // namespace LK_ISA
}  // namespace lora_kernels
