// The panels of the form that adds (linear_add_isa.cpp): how B and rows of h are packed, as floats
// or as bf16 pairs of ranks for the dot instruction, and how a step of them is read and multiplied.
#pragma once

#include <type_traits>

#include "linear_jobs.h"
#include "lora_kernels/simd_pairs.h"

namespace lora_kernels {
namespace LK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectors = 4, kRows = 6;
#else
constexpr int kVectors = 1, kRows = 6;  // twelve ymm accumulators, two of b, one of h
#endif
constexpr int kPanel = kVectors * kLanes;
constexpr int64_t kAheadRows = 16;  // of B that packing asks for early

// Packed B as floats: panel[r][kPanel].
template <class TB>
struct FloatPanel {
  using V = vf;
  static constexpr int kRanks = 1;  // ranks a packed row holds
  static LK_INLINE V vec(const float* p) { return load(p); }
  static LK_INLINE V bcast(const float* p) { return broadcast(*p); }
  static LK_INLINE vf mac(V h, V b, vf acc) { return fma(h, b, acc); }

  static void pack(const Factors& f, int64_t n0, int cols, float* panel) {
    const TB* b = static_cast<const TB*>(f.b);
    if (!f.by_columns) {
      for (int64_t r = 0; r < f.R; r++) {
        for (int v = 0; v < kVectors; v++) {
          const int left = cols - v * kLanes;
          const TB* p = b + r * f.b_stride + n0 + v * kLanes;
          store(panel + r * kPanel + v * kLanes, left >= kLanes ? load(p)
                                                 : left > 0     ? load_n(p, left)
                                                                : zero());
        }
      }
      return;
    }
    for (int v = 0; v < kVectors; v++) {
      for (int64_t r = 0; r < f.R; r += 16) {
        const int ranks = clip(f.R - r, 16);
        vf t[16];
        for (int i = 0; i < 16; i++) {
          const int n = v * kLanes + i;
          const TB* from = b + (n0 + n) * f.b_stride + r;
          t[i] = n >= cols ? zero() : ranks == 16 ? load(from) : load_n(from, ranks);
        }
        transpose16(t);
        for (int i = 0; i < ranks; i++) store(panel + (r + i) * kPanel + v * kLanes, t[i]);
      }
    }
  }

  // Whether a row of the base's h can be read where it is.
  static bool in_place(const Factors&) { return std::is_same<TB, float>::value; }

  template <class TH>
  static void pack_row(const TH* h, int64_t R, float scale, float* out) {
    const vf s = broadcast(scale);
    for (int64_t r = 0; r < R; r += kLanes) {
      const int left = clip(R - r, kLanes);
      store(out + r, mul(s, left == kLanes ? load(h + r) : load_n(h + r, left)));
    }
  }
};

#if LK_HAS_BF16_DOT
// Packed B as bf16 pairs: panel[r / 2][kPanel], an odd rank paired with zero.
struct PairPanel {
  using V = vb;
  static constexpr int kRanks = 2;
  static LK_INLINE V vec(const float* p) { return as_pairs(load(p)); }
  static LK_INLINE V bcast(const float* p) { return broadcast_pair(float_bits(*p)); }
  static LK_INLINE vf mac(V h, V b, vf acc) { return dot(h, b, acc); }

  static void pack(const Factors& f, int64_t n0, int cols, float* panel) {
    const bf16* b = static_cast<const bf16*>(f.b);
    if (!f.by_columns) {
      for (int64_t r = 0; r < f.R; r += 2) {
        for (int v = 0; v < kVectors; v += 2) {
          const int left = cols - v * kLanes;
          const bf16* p = b + r * f.b_stride + n0 + v * kLanes;
          __builtin_prefetch(p + kAheadRows * f.b_stride);
          __builtin_prefetch(p + (kAheadRows + 1) * f.b_stride);
          const vb none = as_pairs(zero());
          const vb even = left > 0 ? load_pairs_n(p, left) : none;
          const vb odd = left > 0 && r + 1 < f.R ? load_pairs_n(p + f.b_stride, left) : none;
          vb first, last;
          interleave(even, odd, &first, &last);
          float* out = panel + r / 2 * kPanel + v * kLanes;
          store(out, as_floats(first));
          store(out + kLanes, as_floats(last));
        }
      }
      return;
    }
    for (int v = 0; v < kVectors; v++) {
      for (int64_t r = 0; r < f.R; r += 32) {
        const int ranks = clip(f.R - r, 32);
        vf t[16];
        for (int i = 0; i < 16; i++) {
          const int n = v * kLanes + i;
          __builtin_prefetch(b + (n0 + n + 16) * f.b_stride + r);
          t[i] = n < cols ? as_floats(load_pairs_n(b + (n0 + n) * f.b_stride + r, ranks)) : zero();
        }
        transpose16(t);
        for (int i = 0; 2 * i < ranks; i++) {
          store(panel + (r / 2 + i) * kPanel + v * kLanes, t[i]);
        }
      }
    }
  }

  static bool in_place(const Factors& f) {
    return f.R % 2 == 0 && f.h_stride % 2 == 0 && reinterpret_cast<uintptr_t>(f.h) % 4 == 0;
  }

  template <class TH>
  static void pack_row(const TH* h, int64_t R, float scale, float* out) {
    const vf s = broadcast(scale);
    for (int64_t r = 0; r < R; r += 2 * kLanes) {
      const int left = clip(R - r, 2 * kLanes);
      const vf lo = load_n(h + r, clip(left, kLanes));
      const vf hi = left > kLanes ? load_n(h + r + kLanes, left - kLanes) : zero();
      store(out + r / 2, as_floats(narrow_pairs(mul(s, lo), mul(s, hi))));
    }
  }
};
#endif

}  // namespace
}  // namespace LK_ISA
}  // namespace lora_kernels
