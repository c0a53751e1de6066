// Row form of the shrink: out[m, r] = alpha * sum_k x[m, k] a[r, k] for many rows, vectors along r.
//
// A is turned once: panels of 16 ranks, k by k. A step of k loads one vector of a panel and takes
// it kRows times, each with one number of x, broadcast: where x is float from where it lies, else
// from a block of it that was widened (and masked, for dropout) first. A block of k stays in L1
// while all panels and kBlockRows rows pass over it, and sums of a block are added up one after
// the other, as one long sum would lose its last bits step by step. Every (m, r) owns one
// accumulator and one fixed order of additions: a row's bits depend on neither the other rows nor
// the split over threads. The dot form (linear_dot_isa.cpp) packs nothing and serves few rows.
#include <type_traits>

#include "linear_jobs.h"
#include "lora_kernels/simd.h"

namespace lora_kernels {
namespace LK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;  // twelve ymm accumulators, two of a, one of x
#endif
constexpr int64_t kBlock = 128, kBlockRows = 24;

// a (R, K) as [ceil(R / 16)][K][16], the ranks that are missing as zeros.
template <class TA>
void turn(const DotJob& job, int64_t R, float* panels) {
  const TA* a = static_cast<const TA*>(job.a);
  for (int64_t r = 0; r < R; r += kLanes, panels += job.K * kLanes) {
    const int ranks = clip(R - r, kLanes);
    for (int64_t k = 0; k < job.K; k += 16) {
      const int cols = clip(job.K - k, 16);
      vf t[16];
      for (int i = 0; i < 16; i++) {
        const TA* from = a + (r + i) * job.a_stride + k;
        t[i] = i >= ranks ? zero() : cols == 16 ? load(from) : load_n(from, cols);
      }
      transpose16(t);
      for (int i = 0; i < cols; i++) store(panels + (k + i) * kLanes, t[i]);
    }
  }
}

// `steps` numbers of one row of x from column k, widened and without those that `mask` drops.
template <class TX>
void widen(const TX* x, const uint8_t* mask, int64_t k, int steps, float* out) {
  for (int i = 0; i < steps; i += kLanes) {
    const int left = clip(steps - i, kLanes);
    vf v = left == kLanes ? load(x + k + i) : load_n(x + k + i, left);
    if (mask != nullptr) {
      const uint8_t* bits = mask + (k + i) / 8;
      v = keep(v, left > 8 ? bits[0] | static_cast<uint32_t>(bits[1]) << 8 : bits[0]);
    }
    store_n(out + i, v, left);
  }
}

// sums[m][0 .. 16) += `steps` numbers of kRows rows of x times those of a panel.
LK_INLINE void tile(const float* const* x, const float* panel, int64_t steps, float* sums,
                    int64_t stride) {
  vf acc[kRows];
  LK_UNROLL
  for (int m = 0; m < kRows; m++) acc[m] = zero();
  for (int64_t k = 0; k < steps; k++) {
    const vf av = load(panel + k * kLanes);
    LK_UNROLL
    for (int m = 0; m < kRows; m++) acc[m] = fma(broadcast(x[m][k]), av, acc[m]);
  }
  LK_UNROLL
  for (int m = 0; m < kRows; m++) {
    float* sum = sums + m * stride;
    store(sum, add(load(sum), acc[m]));
  }
}

template <class TX>
void rows_of(const DotJob& job, int64_t m0, int rows, int64_t R, const float* panels, float* sums,
             float* wide) {
  const int64_t stride = (R + kLanes - 1) / kLanes * kLanes;
  const bool in_place = std::is_same<TX, float>::value && job.mask == nullptr;
  const int padded = (rows + kRows - 1) / kRows * kRows;
  int64_t row[kBlockRows];
  const TX* x[kBlockRows];
  for (int m = 0; m < padded; m++) {  // rows past the last repeat it
    const int64_t i = m0 + (m < rows ? m : rows - 1);
    row[m] = job.rows ? job.rows[i] : i;
    x[m] = static_cast<const TX*>(job.x) + row[m] * job.x_stride;
  }
  std::memset(sums, 0, sizeof(float) * static_cast<size_t>(padded * stride));
  for (int64_t k = 0; k < job.K; k += kBlock) {
    const int steps = clip(job.K - k, kBlock);
    const float* at[kBlockRows];
    for (int m = 0; m < padded; m++) {
      at[m] = in_place ? reinterpret_cast<const float*>(x[m]) + k : wide + m * kBlock;
      if (in_place || m >= rows) continue;
      widen(x[m], job.mask ? job.mask + row[m] * job.mask_stride : nullptr, k, steps,
            wide + m * kBlock);
    }
    for (int m = rows; !in_place && m < padded; m++) at[m] = at[rows - 1];
    for (int64_t r = 0; r < R; r += kLanes) {
      const float* panel = panels + r * job.K + k * kLanes;
      for (int m = 0; m < padded; m += kRows)
        tile(at + m, panel, steps, sums + m * stride + r, stride);
    }
  }
  const vf alpha = broadcast(job.alpha);
  for (int m = 0; m < rows; m++) {
    float* out = job.out + row[m] * job.out_stride;
    for (int64_t r = 0; r < R; r += kLanes) {
      store_n(out + r, mul(alpha, load(sums + m * stride + r)), clip(R - r, kLanes));
    }
  }
}

template <class TX, class TA>
void shrink(const DotJob& job, int64_t m0, int64_t m1, int64_t R) {
  const int64_t stride = (R + kLanes - 1) / kLanes * kLanes;
  float* panels = static_cast<float*>(thread_scratch(0, 4 * stride * job.K));
  float* sums = static_cast<float*>(thread_scratch(1, 4 * kBlockRows * (stride + kBlock)));
  turn<TA>(job, R, panels);
  for (int64_t m = m0; m < m1; m += kBlockRows) {
    rows_of<TX>(job, m, clip(m1 - m, kBlockRows), R, panels, sums, sums + kBlockRows * stride);
  }
}

template <class TX>
void shrink_by_adapter(const DotJob& job, int64_t m0, int64_t m1, int64_t R) {
  if (job.a_dtype == DType::f32) {
    shrink<TX, float>(job, m0, m1, R);
  } else {
    shrink<TX, TX>(job, m0, m1, R);
  }
}

}  // namespace

void shrink_kernel(const DotJob& job, int64_t m0, int64_t m1, int64_t R) {
  switch (job.x_dtype) {
    case DType::f32:
      return shrink<float, float>(job, m0, m1, R);
    case DType::f16:
      return shrink_by_adapter<f16>(job, m0, m1, R);
    case DType::bf16:
      return shrink_by_adapter<bf16>(job, m0, m1, R);
  }
}

}  // namespace LK_ISA
}  // namespace lora_kernels
