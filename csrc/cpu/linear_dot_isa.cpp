// Dot form: both operands have their rows contiguous in k. Used for x A^T and for the base product.
//
// A tile of MR rows of x and NR rows of the other operand holds MR * NR vector accumulators over
// the whole of K: each step loads MR + NR vectors and does MR * NR products, 16 elements a step, or
// 32 with the bf16 dot instruction. Nothing is packed, so a weight is streamed from memory once.
// At the end the accumulators are summed across their lanes, sixteen at a time. Every (m, n) owns
// one accumulator and one fixed order of additions, whatever the tile: a row's bits depend on
// neither the other rows nor the split over threads. A long sum of the shrink is made of parts, for
// a smaller rounding error.
//
// In the base product the low-rank update is the same loop with r in place of k (K is extended by
// s*h against B), so y is rounded once. Rows past the edge of a tile repeat its last row and are
// not stored.
#include <type_traits>

#include "linear_jobs.h"
#include "lora_kernels/simd_pairs.h"

namespace lora_kernels {
namespace LK_ISA {
namespace {

// How one step of k is loaded and multiplied: widened to float, or as bf16 pairs.
template <class TX, class TW>
struct Step {
  static constexpr int kSize = 16;
  using V = vf;
  template <class T>
  static LK_INLINE V full(const T* p) {
    return load(p);
  }
  template <class T>
  static LK_INLINE V tail(const T* p, int n) {
    return load_n(p, n);
  }
  static LK_INLINE vf mac(V x, V w, vf acc) { return fma(x, w, acc); }
};

#if LK_HAS_BF16_DOT
template <>
struct Step<bf16, bf16> {
  static constexpr int kSize = 32;
  using V = vb;
  static LK_INLINE V full(const bf16* p) { return load_pairs(p); }
  static LK_INLINE V tail(const bf16* p, int n) { return load_pairs_n(p, n); }
  static LK_INLINE vf mac(V x, V w, vf acc) { return dot(x, w, acc); }
};
#endif

constexpr int64_t kLongSum = 8192, kSumPart = 2048;  // a longer sum of the shrink is made of parts

#if defined(__AVX512F__)
constexpr int64_t kPrefetch = 2048;  // bytes ahead in the streamed operand
#else
constexpr int64_t kPrefetch = 512;
#endif

// `next` is the distance from w[n] to the row that the following tile puts in its place: near the
// end of K the prefetch moves on to it.
template <class TX, class TW, int MR, int NR, bool kMasked>
LK_INLINE void accumulate(const TX* const* x, const TW* const* w, const uint8_t* const* mask,
                          int64_t K, int64_t next, vf (&acc)[MR * NR]) {
  using S = Step<TX, TW>;
  constexpr int64_t kAhead = kPrefetch / static_cast<int64_t>(sizeof(TW));
  const int64_t full = K / S::kSize * S::kSize;
  for (int64_t k = 0; k < full; k += S::kSize) {
    const int64_t ahead = k + kAhead < full ? kAhead : kAhead - full + next;
    typename S::V wv[NR];
    LK_UNROLL
    for (int n = 0; n < NR; n++) {
      wv[n] = S::full(w[n] + k);
      __builtin_prefetch(w[n] + k + ahead);
    }
    LK_UNROLL
    for (int m = 0; m < MR; m++) {
      typename S::V xv = S::full(x[m] + k);
      if (kMasked) xv = keep(xv, load_bits(mask[m] + k / 8, S::kSize));
      LK_UNROLL
      for (int n = 0; n < NR; n++) acc[n * MR + m] = S::mac(xv, wv[n], acc[n * MR + m]);
    }
  }
  if (full < K) {
    const int left = static_cast<int>(K - full);
    typename S::V wv[NR];
    LK_UNROLL
    for (int n = 0; n < NR; n++) wv[n] = S::tail(w[n] + full, left);
    LK_UNROLL
    for (int m = 0; m < MR; m++) {
      typename S::V xv = S::tail(x[m] + full, left);
      if (kMasked) xv = keep(xv, load_bits(mask[m] + full / 8, left));
      LK_UNROLL
      for (int n = 0; n < NR; n++) acc[n * MR + m] = S::mac(xv, wv[n], acc[n * MR + m]);
    }
  }
}

// sums[i] = the lanes of acc[i] added up; sums has room for a multiple of 16.
template <int COUNT>
LK_INLINE void sum_lanes(const vf (&acc)[COUNT], float* sums) {
  LK_UNROLL
  for (int i = 0; i < COUNT; i += 16) {
    vf group[16];
    LK_UNROLL
    for (int j = 0; j < 16; j++) group[j] = i + j < COUNT ? acc[i + j] : zero();
    store(sums + i, hsum16(group));
  }
}

constexpr int padded(int n) { return (n + 15) / 16 * 16; }

template <class TX, class TA, int MR, int NR, bool kMasked>
void dot_tile(const DotJob& job, int64_t m0, int rows, int64_t j0, int cols) {
  const TX* x[MR];
  const TA* a[NR];
  const uint8_t* mask[MR] = {};
  int64_t row[MR];
  for (int m = 0; m < MR; m++) {
    const int64_t i = m0 + (m < rows ? m : rows - 1);
    row[m] = job.rows ? job.rows[i] : i;
    x[m] = static_cast<const TX*>(job.x) + row[m] * job.x_stride;
    if (kMasked) mask[m] = job.mask + row[m] * job.mask_stride;
  }
  for (int n = 0; n < NR; n++) {
    a[n] = static_cast<const TA*>(job.a) + (j0 + (n < cols ? n : cols - 1)) * job.a_stride;
  }
  float sums[padded(MR * NR)];
  const int64_t block = job.K <= kLongSum ? job.K : kSumPart;
  int64_t k = 0;
  do {
    const int64_t left = job.K - k, now = left < block ? left : block;
    vf acc[MR * NR];
    LK_UNROLL
    for (int i = 0; i < MR * NR; i++) acc[i] = zero();
    accumulate<TX, TA, MR, NR, kMasked>(x, a, mask, now,
                                        left <= block ? NR * job.a_stride - k : now, acc);
    if (k == 0) {
      sum_lanes(acc, sums);
    } else {
      float part[padded(MR * NR)];
      sum_lanes(acc, part);
      for (int i = 0; i < MR * NR; i++) sums[i] += part[i];
    }
    for (int m = 0; m < MR; m++) {
      x[m] += now;
      if (kMasked) mask[m] += now / 8;
    }
    for (int n = 0; n < NR; n++) a[n] += now;
  } while ((k += block) < job.K);
  for (int m = 0; m < rows; m++) {
    float* out = job.out + row[m] * job.out_stride + j0;
    for (int n = 0; n < cols; n++) out[n] = job.alpha * sums[n * MR + m];
  }
}

template <class TX, class TW, int MR, int NR, class TB>
void base_tile(const BaseJob& job, int64_t m0, int rows, int64_t n0, int cols) {
  using TY = TX;
  const TX* x[MR];
  const TW* w[NR];
  int64_t n_of[NR];
  const RowUpdate* update[MR] = {};
  bool any = false, shared = true;
  for (int m = 0; m < MR; m++) {
    const int64_t i = m0 + (m < rows ? m : rows - 1);
    x[m] = static_cast<const TX*>(job.x) + i * job.x_stride;
    if (job.updates != nullptr) {
      update[m] = job.updates + i;
      any |= update[m]->rank > 0;
      shared &= update[m]->b == update[0]->b && update[m]->rank == update[0]->rank;
    }
  }
  for (int n = 0; n < NR; n++) {
    n_of[n] = n0 + (n < cols ? n : cols - 1);
    w[n] = static_cast<const TW*>(job.w) + n_of[n] * job.w_stride;
  }
  vf acc[MR * NR];
  LK_UNROLL
  for (int i = 0; i < MR * NR; i++) acc[i] = zero();
  accumulate<TX, TW, MR, NR, false>(x, w, nullptr, job.K, NR * job.w_stride, acc);

  if (any && shared) {
    const TB* b = static_cast<const TB*>(update[0]->b);
    const int64_t stride = update[0]->b_stride, rank = update[0]->rank;
    for (int64_t r = 0; r < rank; r += 16) {
      const int left = static_cast<int>(rank - r < 16 ? rank - r : 16);
      vf bv[NR];
      LK_UNROLL
      for (int n = 0; n < NR; n++) bv[n] = load_n(b + n_of[n] * stride + r, left);
      LK_UNROLL
      for (int m = 0; m < MR; m++) {
        const vf h = mul(broadcast(update[m]->scale), load_n(update[m]->h + r, left));
        LK_UNROLL
        for (int n = 0; n < NR; n++) acc[n * MR + m] = fma(h, bv[n], acc[n * MR + m]);
      }
    }
  } else if (any) {
    LK_UNROLL
    for (int m = 0; m < MR; m++) {
      const TB* b = static_cast<const TB*>(update[m]->b);
      const int64_t stride = update[m]->b_stride, rank = update[m]->rank;
      for (int64_t r = 0; r < rank; r += 16) {
        const int left = static_cast<int>(rank - r < 16 ? rank - r : 16);
        const vf h = mul(broadcast(update[m]->scale), load_n(update[m]->h + r, left));
        LK_UNROLL
        for (int n = 0; n < NR; n++) {
          acc[n * MR + m] = fma(h, load_n(b + n_of[n] * stride + r, left), acc[n * MR + m]);
        }
      }
    }
  }

  float sums[padded(MR * NR)];
  sum_lanes(acc, sums);
  const TY* bias = static_cast<const TY*>(job.bias);
  for (int m = 0; m < rows; m++) {
    TY* y = static_cast<TY*>(job.y) + (m0 + m) * job.y_stride + n0;
    for (int n = 0; n < cols; n++) {
      const float sum = sums[n * MR + m];
      y[n] = from_float<TY>(bias ? sum + to_float(bias[n0 + n]) : sum);
    }
  }
}

// Tile shapes: MR * NR accumulators and NR + 1 operands in the register file.
#if defined(__AVX512F__)
constexpr int kWide = 24;
#else
constexpr int kWide = 4;
#endif

template <int MR>
constexpr int cols_for() {
  return kWide == 24 ? (MR == 8 ? 3 : 4) : kWide / MR;
}

template <class TX, class TA, int MR, bool kMasked>
void dot_rows(const DotJob& job, int64_t m0, int rows, int64_t j0, int64_t j1) {
  constexpr int NR = cols_for<MR>();
  for (int64_t j = j0; j < j1; j += NR) {
    dot_tile<TX, TA, MR, NR, kMasked>(job, m0, rows, j,
                                      static_cast<int>(j1 - j < NR ? j1 - j : NR));
  }
}

template <class TX, class TA, bool kMasked>
void dot_all(const DotJob& job, int64_t m0, int64_t m1, int64_t j0, int64_t j1) {
  for (int64_t m = m0; m < m1;) {
    const int left = static_cast<int>(m1 - m < 6 ? m1 - m : 6);
    if (kWide == 24 && left > 2) {
      dot_rows<TX, TA, kWide == 24 ? 6 : 1, kMasked>(job, m, left, j0, j1);
      m += left;
    } else {
      const int rows = left < 2 ? left : 2;
      dot_rows<TX, TA, 2, kMasked>(job, m, rows, j0, j1);
      m += rows;
    }
  }
}

template <class TX, class TA>
void dot_typed(const DotJob& job, int64_t m0, int64_t m1, int64_t j0, int64_t j1) {
  if (job.mask != nullptr) {
    dot_all<TX, TA, true>(job, m0, m1, j0, j1);
  } else {
    dot_all<TX, TA, false>(job, m0, m1, j0, j1);
  }
}

// For one or two rows of x memory is all that counts: one row of w after the other is read fastest.
template <class T, int MR, class TB>
LK_INLINE void base_rows(const BaseJob& job, int64_t m0, int rows, int64_t n0, int64_t n1) {
  constexpr int NR = kWide == 24 && MR <= 2 ? 1 : cols_for<MR>();
  for (int64_t n = n0; n < n1; n += NR) {
    base_tile<T, T, MR, NR, TB>(job, m0, rows, n, static_cast<int>(n1 - n < NR ? n1 - n : NR));
  }
}

// Blocks of w rows small enough for L2, each used by all rows of x before the next is read.
template <class T, class TB>
void base_typed(const BaseJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  constexpr int64_t kBlockBytes = 192 << 10;
  int64_t block = kBlockBytes / (job.K * static_cast<int64_t>(sizeof(T)) + 1) / 24 * 24;
  if (m1 - m0 <= 8) block = n1 - n0;
  if (block < 24) block = 24;
  for (int64_t n = n0; n < n1; n += block) {
    const int64_t end = n + block < n1 ? n + block : n1;
    for (int64_t m = m0; m < m1;) {
      const int left = static_cast<int>(m1 - m < 8 ? m1 - m : 8);
      const int rows = kWide == 4 && left > 2 ? 2 : left;
      if (rows == 1) {
        base_rows<T, 1, TB>(job, m, rows, n, end);
      } else if (rows == 2) {
        base_rows<T, 2, TB>(job, m, rows, n, end);
      } else if (rows <= 4) {
        base_rows<T, kWide == 24 ? 4 : 2, TB>(job, m, rows, n, end);
      } else {
        base_rows<T, kWide == 24 ? 8 : 2, TB>(job, m, rows, n, end);
      }
      m += rows;
    }
  }
}

template <class T>
void base_by_adapter(const BaseJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  if (job.b_dtype == DType::f32) {
    base_typed<T, float>(job, m0, m1, n0, n1);
  } else {
    base_typed<T, T>(job, m0, m1, n0, n1);
  }
}

template <class TX>
void dot_by_adapter(const DotJob& job, int64_t m0, int64_t m1, int64_t j0, int64_t j1) {
  if (job.a_dtype == DType::f32) {
    dot_typed<TX, float>(job, m0, m1, j0, j1);
  } else {
    dot_typed<TX, TX>(job, m0, m1, j0, j1);
  }
}

}  // namespace

void dot_kernel(const DotJob& job, int64_t m0, int64_t m1, int64_t j0, int64_t j1) {
  switch (job.x_dtype) {
    case DType::f32:
      return dot_typed<float, float>(job, m0, m1, j0, j1);
    case DType::f16:
      return dot_by_adapter<f16>(job, m0, m1, j0, j1);
    case DType::bf16:
      return dot_by_adapter<bf16>(job, m0, m1, j0, j1);
  }
}

void base_kernel(const BaseJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  switch (job.dtype) {
    case DType::f32:
      return base_typed<float, float>(job, m0, m1, n0, n1);
    case DType::f16:
      return base_by_adapter<f16>(job, m0, m1, n0, n1);
    case DType::bf16:
      return base_by_adapter<bf16>(job, m0, m1, n0, n1);
  }
}

}  // namespace LK_ISA
}  // namespace lora_kernels
