// Would W + scale * B A be finite everywhere? Answered without writing to W.
//
// A bound settles almost every row at the price of reading W once: no element of row n exceeds
//   max|W[n]| + |scale| * sum over r of |B[n][r]| * max|A[r]|
// in exact arithmetic, and the float32 kernel's rounding adds less than a part in a thousand. Where
// that stays below the largest finite value of W's dtype (and the kernel's intermediate sums below
// float32's), the row is finite. Only rows that the bound leaves open are merged for real, a few at
// a time, in a copy. Maxima are taken on the bits without the sign: they order finite values, then
// Inf, then NaN, so one pass finds all three.
#include "merge_isa.h"

namespace lora_kernels {
namespace LK_ISA {

namespace {

constexpr int64_t kCopyRows = 12;
constexpr int64_t kGrainElems = 1 << 16;
constexpr double kMargin = 1.001;
constexpr double kFloatMax = 3.4028234663852886e38;

struct Limits {
  uint32_t inf_bits;  // of W's dtype, without the sign
  double max;         // the largest finite value
};
LK_INLINE Limits limits(float) { return {0x7f800000u, kFloatMax}; }
LK_INLINE Limits limits(bf16) { return {0x7f80u, 3.3895313892515355e38}; }
LK_INLINE Limits limits(f16) { return {0x7c00u, 65504.0}; }

LK_INLINE uint32_t magnitude(float x) { return float_bits(x) & 0x7fffffffu; }
LK_INLINE uint16_t magnitude(bf16 x) { return x.bits & 0x7fffu; }
LK_INLINE uint16_t magnitude(f16 x) { return x.bits & 0x7fffu; }
LK_INLINE float from_magnitude(float, uint32_t bits) { return bits_float(bits); }
LK_INLINE float from_magnitude(bf16, uint32_t bits) { return bits_float(bits << 16); }
LK_INLINE float from_magnitude(f16, uint32_t bits) {
  return to_float(f16{static_cast<uint16_t>(bits)});
}

// Largest magnitude, as bits, of p[0], p[step], ... p[(n - 1) * step].
template <class T>
uint32_t max_magnitude(const T* p, int64_t n, int64_t step) {
  decltype(magnitude(*p)) top = 0;
  if (step == 1) {
    for (int64_t i = 0; i < n; ++i) top = magnitude(p[i]) > top ? magnitude(p[i]) : top;
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const auto m = magnitude(p[i * step]);
      top = m > top ? m : top;
    }
  }
  return top;
}

// max |m[i]| as a float: Inf where the row holds an Inf or NaN.
template <class T>
float row_max(const Matrix& m, int64_t i) {
  const T* p = static_cast<const T*>(m.data) + i * m.row_stride;
  const uint32_t bits = max_magnitude(p, m.cols, m.col_stride);
  return bits >= limits(T{}).inf_bits ? bits_float(0x7f800000u) : from_magnitude(T{}, bits);
}
float row_max(const Matrix& m, int64_t i) {
  if (m.dtype == DType::f32) return row_max<float>(m, i);
  return m.dtype == DType::bf16 ? row_max<bf16>(m, i) : row_max<f16>(m, i);
}

bool is_finite(float x) { return (float_bits(x) & 0x7fffffffu) < 0x7f800000u; }
double magnitude64(float x) { return static_cast<double>(bits_float(magnitude(x))); }

enum class Verdict { finite, open, not_finite };

// max_a[r] = max |A[r]|, all finite.
template <class T>
Verdict judge_row(const MergeJob& job, int64_t i, const float* max_a) {
  const float top = row_max<T>(job.w, i);
  if (!is_finite(top)) return Verdict::not_finite;
  const LowRank& term = job.terms[0];
  const double scale = magnitude64(term.scale);
  double sum = 0.0, factor = 0.0;  // factor: the largest that the kernel may scale
  for (int64_t r = 0; r < term.b.cols; ++r) {
    const float b = element(term.b, i, r);
    if (!is_finite(b)) return Verdict::not_finite;
    const double m = magnitude64(b);
    const double ma = static_cast<double>(max_a[r]);
    factor = m > factor ? m : factor;
    factor = ma > factor ? ma : factor;
    sum += m * ma;
  }
  const bool inside = sum * kMargin < kFloatMax && scale * factor < kFloatMax &&
                      (static_cast<double>(top) + scale * sum) * kMargin < limits(T{}).max;
  return inside ? Verdict::finite : Verdict::open;
}

// Merges rows i .. i + n of W in `copy` and looks at the outcome.
template <class T>
bool merged_rows_finite(const MergeJob& job, int64_t i, int64_t n, T* copy) {
  const Matrix& w = job.w;
  const T* from = static_cast<const T*>(w.data) + i * w.row_stride;
  for (int64_t y = 0; y < n; ++y) {
    for (int64_t x = 0; x < w.cols; ++x) {
      copy[y * w.cols + x] = from[y * w.row_stride + x * w.col_stride];
    }
  }
  MergeJob part = job;
  part.w = {copy, w.dtype, n, w.cols, w.cols, 1};
  Matrix& b = part.terms[0].b;
  b.rows = n;
  b.data = static_cast<char*>(b.data) + i * b.row_stride * dtype_size(b.dtype);
  merge_jobs(&part, 1);
  return max_magnitude(copy, n * w.cols, 1) < limits(T{}).inf_bits;
}

template <class T>
bool run(const MergeJob& job) {
  const Matrix &w = job.w, &a = job.terms[0].a;
  if (!is_finite(job.terms[0].scale)) return false;
  float* max_a = new float[static_cast<size_t>(a.rows)];
  int finite = 1;
  for (int64_t r = 0; r < a.rows && finite; ++r) {
    max_a[r] = row_max(a, r);
    finite = is_finite(max_a[r]);
  }
  const int64_t chunks = (w.rows + kCopyRows - 1) / kCopyRows;
  const int64_t grain = (kGrainElems - 1) / (kCopyRows * w.cols) + 1;
  if (finite) {
    parallel_for(chunks, grain, [&](int64_t begin, int64_t end) {
      T* copy = nullptr;
      for (int64_t c = begin; c < end && __atomic_load_n(&finite, __ATOMIC_RELAXED); ++c) {
        const int64_t i0 = c * kCopyRows;
        const int64_t i1 = i0 + kCopyRows < w.rows ? i0 + kCopyRows : w.rows;
        bool ok = true, open = false;
        for (int64_t i = i0; i < i1 && ok; ++i) {
          const Verdict verdict = judge_row<T>(job, i, max_a);
          ok = verdict != Verdict::not_finite;
          open = open || verdict == Verdict::open;
        }
        if (ok && open) {
          if (copy == nullptr) copy = new T[static_cast<size_t>(kCopyRows * w.cols)];
          ok = merged_rows_finite(job, i0, i1 - i0, copy);
        }
        if (!ok) __atomic_store_n(&finite, 0, __ATOMIC_RELAXED);
      }
      delete[] copy;
    });
  }
  delete[] max_a;
  return finite != 0;
}

}  // namespace

bool merge_finite_job(const MergeJob& job) {
  if (job.w.dtype == DType::f32) return run<float>(job);
  return job.w.dtype == DType::bf16 ? run<bf16>(job) : run<f16>(job);
}

}  // namespace LK_ISA
}  // namespace lora_kernels
