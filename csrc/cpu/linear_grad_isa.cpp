// Gradient form: out[r, k] = alpha * sum_m g[m, r] x[m, k], vectors along k.
//
// For each tile of kTile columns: blocks of rows of x are widened (and masked, for dropout) into a
// small buffer once, then every group of kRanks ranks takes its outer products with it, kSide
// columns at a time, added to a tile of sums after each block. With bf16 x and a bf16 result the
// buffer holds pairs of rows (m, m + 1) for the dot instruction and g is rounded once to bf16. A
// block of x lies in as many places as it has rows, which no hardware fetches ahead, so the
// products of the block before ask for it. A sum runs over m in order in one thread, so the result
// does not depend on the thread count.
#include "linear_jobs.h"
#include "lora_kernels/simd_pairs.h"

namespace lora_kernels {
namespace LK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectors = 4, kRanks = 4;
#else
constexpr int kVectors = 1, kRanks = 4;
#endif
constexpr int kSide = kVectors * kLanes;         // columns of a product at a time
constexpr int kTile = kVectors == 1 ? 64 : 128;  // columns packed at a time: whole lines, few pages
constexpr int kSteps = 48;                       // packed rows in a block

// Of `cols` columns, with those of zeros that complete a product.
LK_INLINE int padded(int cols) { return (cols + kSide - 1) / kSide * kSide; }
LK_INLINE int64_t row_of(const GradJob& job, int64_t m) { return job.rows ? job.rows[m] : m; }

// Mask bits of columns [k, k + n), k a multiple of 8.
LK_INLINE uint32_t mask_bits(const GradJob& job, int64_t row, int64_t k, int n) {
  return load_bits(job.mask + row * job.mask_stride + k / 8, n);
}

// One row at a time, as floats; g is read where it is.
template <class TX>
struct Single {
  using V = vf;
  static constexpr int kRows = 1;
  static LK_INLINE V vec(const float* p) { return load(p); }
  static LK_INLINE V bcast(const float* p) { return broadcast(*p); }
  static LK_INLINE vf mac(V g, V x, vf acc) { return fma(g, x, acc); }

  static void pack_x(const GradJob& job, int64_t m0, int rows, int64_t k0, int cols, float* out) {
    for (int m = 0; m < rows; m++) {
      const int64_t row = row_of(job, m0 + m);
      const TX* x = static_cast<const TX*>(job.x) + row * job.x_stride + k0;
      for (int v = 0; v * kLanes < padded(cols); v++) {
        const int left = cols - v * kLanes;
        vf xv = left >= kLanes ? load(x + v * kLanes)
                : left > 0     ? load_n(x + v * kLanes, left)
                               : zero();
        if (job.mask != nullptr && left > 0) {
          xv = keep(xv, mask_bits(job, row, k0 + v * kLanes, clip(left, kLanes)));
        }
        store(out + m * kTile + v * kLanes, xv);
      }
    }
  }

  static void pack_g(const GradJob& job, int64_t ranks, float* out) {
    for (int64_t m = 0; m < job.M; m++) {
      const float* g = job.g + row_of(job, m) * job.g_stride;
      for (int64_t r = 0; r < ranks; r += kLanes) {
        const int left = clip(ranks - r, kLanes);
        const int live = clip(job.R - r, left);
        store_n(out + m * ranks + r, live > 0 ? load_n(g + r, live) : zero(), left);
      }
    }
  }
};

#if LK_HAS_BF16_DOT
// Two rows at a time, as bf16 pairs; an odd last row is paired with zeros.
struct Pair {
  using V = vb;
  static constexpr int kRows = 2;
  static LK_INLINE V vec(const float* p) { return as_pairs(load(p)); }
  static LK_INLINE V bcast(const float* p) { return broadcast_pair(float_bits(*p)); }
  static LK_INLINE vf mac(V g, V x, vf acc) { return dot(g, x, acc); }

  static LK_INLINE vb load_x(const GradJob& job, int64_t row, int64_t k, int left) {
    const bf16* x = static_cast<const bf16*>(job.x) + row * job.x_stride + k;
    vb xv = left >= 32 ? load_pairs(x) : load_pairs_n(x, left);
    if (job.mask != nullptr) xv = keep(xv, mask_bits(job, row, k, clip(left, 32)));
    return xv;
  }

  static void pack_x(const GradJob& job, int64_t m0, int rows, int64_t k0, int cols, float* out) {
    for (int m = 0; m < rows; m += 2) {
      const int64_t even = row_of(job, m0 + m);
      const int64_t odd = m + 1 < rows ? row_of(job, m0 + m + 1) : -1;
      float* p = out + m / 2 * kTile;
      for (int v = 0; v * kLanes < padded(cols); v += 2) {
        const int left = clip(cols - v * kLanes, 2 * kLanes);
        vb a = as_pairs(zero()), b = a, first, last;
        if (left > 0) {
          a = load_x(job, even, k0 + v * kLanes, left);
          if (odd >= 0) b = load_x(job, odd, k0 + v * kLanes, left);
        }
        interleave(a, b, &first, &last);
        store(p + v * kLanes, as_floats(first));
        store(p + (v + 1) * kLanes, as_floats(last));
      }
    }
  }

  static void pack_g(const GradJob& job, int64_t ranks, float* out) {
    for (int64_t m = 0; m < job.M; m += 2) {
      const float* even = job.g + row_of(job, m) * job.g_stride;
      const float* odd = m + 1 < job.M ? job.g + row_of(job, m + 1) * job.g_stride : nullptr;
      for (int64_t r = 0; r < ranks; r += kLanes) {
        const int left = clip(ranks - r, kLanes);
        const int live = clip(job.R - r, left);
        const vf a = live > 0 ? load_n(even + r, live) : zero();
        const vf b = live > 0 && odd ? load_n(odd + r, live) : zero();
        const vb both = narrow_pairs(a, zero());
        vb first, last;
        interleave(both, narrow_pairs(b, zero()), &first, &last);
        store_n(out + m / 2 * ranks + r, as_floats(first), left);
      }
    }
  }
};
#endif

// Rows of x [m, end) at columns [k, k + cols), which are packed next.
struct NextBlock {
  int64_t m, end, k, cols;

  // Asks for kSide columns, from `side` on, of the i-th row.
  LK_INLINE void fetch(const GradJob& job, int64_t i, int64_t side) const {
    if (m + i >= end || side >= cols) return;
    const char* p = element(job.x, row_of(job, m + i) * job.x_stride + k + side, job.x_dtype);
    for (int64_t at = 0; at < kSide * dtype_size(job.x_dtype); at += 64) {
      __builtin_prefetch(p + at);
    }
  }
};

NextBlock next_block(const GradJob& job, int64_t m, int64_t rows, int64_t k, int64_t k1) {
  m += rows;
  if (m >= job.M) {
    m = 0;
    k += kTile;
  }
  return {m, k < k1 ? clip(job.M, m + rows) : 0, k, k1 - k};
}

// sums[kRanks][kSide] += products of `steps` packed rows at columns [side, side + kSide) of the
// tile, while as many rows of the next block are asked for, one of those of each step, from `from`.
template <class P>
void outer_products(const GradJob& job, const float* g, int64_t ranks, const float* x, int steps,
                    int side, float* sums, bool first, const NextBlock& next, int64_t from) {
  vf acc[kRanks][kVectors];
  LK_UNROLL
  for (int r = 0; r < kRanks; r++) {
    LK_UNROLL
    for (int v = 0; v < kVectors; v++) acc[r][v] = zero();
  }
  for (int m = 0; m < steps; m++) {
    next.fetch(job, from + m * P::kRows, side);
    typename P::V xv[kVectors];
    LK_UNROLL
    for (int v = 0; v < kVectors; v++) xv[v] = P::vec(x + m * kTile + side + v * kLanes);
    LK_UNROLL
    for (int r = 0; r < kRanks; r++) {
      const typename P::V gv = P::bcast(g + m * ranks + r);
      LK_UNROLL
      for (int v = 0; v < kVectors; v++) acc[r][v] = P::mac(gv, xv[v], acc[r][v]);
    }
  }
  LK_UNROLL
  for (int r = 0; r < kRanks; r++) {
    LK_UNROLL
    for (int v = 0; v < kVectors; v++) {
      float* p = sums + r * kTile + side + v * kLanes;
      store(p, first ? acc[r][v] : add(load(p), acc[r][v]));
    }
  }
}

template <class TO>
void write_tile(const GradJob& job, const float* sums, int64_t k0, int cols) {
  TO* out = static_cast<TO*>(job.out);
  const vf alpha = broadcast(job.alpha);
  for (int v = 0; v * kLanes < cols; v++) {
    const int n = clip(cols - v * kLanes, kLanes);
    const int64_t k = k0 + v * kLanes;
    for (int64_t r = 0; r < job.R; r += 16) {
      const int ranks = clip(job.R - r, 16);
      vf t[16];
      for (int i = 0; i < 16; i++) {
        t[i] = i < ranks ? mul(alpha, load(sums + (r + i) * kTile + v * kLanes)) : zero();
      }
      if (job.transposed) {
        transpose16(t);
        for (int i = 0; i < n; i++) store_n(out + (k + i) * job.out_stride + r, t[i], ranks);
      } else {
        for (int i = 0; i < ranks; i++) store_n(out + (r + i) * job.out_stride + k, t[i], n);
      }
    }
  }
}

template <class P, class TO>
void grad_tiles(const GradJob& job, int64_t k0, int64_t k1) {
  const int64_t ranks = (job.R + kRanks - 1) / kRanks * kRanks;
  const int64_t steps = (job.M + P::kRows - 1) / P::kRows;
  // Scratch: packed x, sums, packed g.
  const int64_t x_size = kSteps * kTile, sums_size = ranks * kTile;
  float* x = static_cast<float*>(thread_scratch(0, 4 * (x_size + sums_size)));
  float* sums = x + x_size;
  float* g = static_cast<float*>(thread_scratch(1, 4 * steps * ranks));
  P::pack_g(job, ranks, g);
  constexpr int kRows = kSteps * P::kRows;
  for (int64_t k = k0; k < k1; k += kTile) {
    const int cols = clip(k1 - k, kTile);
    for (int64_t m = 0; m == 0 || m < job.M; m += kRows) {
      const int rows = clip(job.M - m, kRows), packed = (rows + P::kRows - 1) / P::kRows;
      P::pack_x(job, m, rows, k, cols, x);
      const NextBlock next = next_block(job, m, kRows, k, k1);
      for (int side = 0; side < cols; side += kSide) {
        for (int64_t r = 0; r < ranks; r += kRanks) {
          // The first groups of ranks share the rows of the next block.
          const int64_t from = r / kRanks < P::kRows ? r / kRanks : kRows;
          outer_products<P>(job, g + m / P::kRows * ranks + r, ranks, x, packed, side,
                            sums + r * kTile, m == 0, next, from);
        }
      }
    }
    write_tile<TO>(job, sums, k, cols);
  }
}

template <class TX>
void grad_typed(const GradJob& job, int64_t k0, int64_t k1) {
  if (job.out_dtype == DType::f32) {
    grad_tiles<Single<TX>, float>(job, k0, k1);
  } else {
#if LK_HAS_BF16_DOT
    if (job.x_dtype == DType::bf16) return grad_tiles<Pair, bf16>(job, k0, k1);
#endif
    grad_tiles<Single<TX>, TX>(job, k0, k1);
  }
}

}  // namespace

void grad_kernel(const GradJob& job, int64_t k0, int64_t k1) {
  switch (job.x_dtype) {
    case DType::f32:
      return grad_tiles<Single<float>, float>(job, k0, k1);
    case DType::f16:
      return grad_typed<f16>(job, k0, k1);
    case DType::bf16:
      return grad_typed<bf16>(job, k0, k1);
  }
}

}  // namespace LK_ISA
}  // namespace lora_kernels
