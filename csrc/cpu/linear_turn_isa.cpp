// Turned form: y[m, n] = sum_k x[m, k] w[n, k] + s sum_r h[m, r] b[n, r] + bias[n], vectors along
// m.
//
// x is packed once, turned: panels of kPanelRows rows, k by k, so that a step of k is a few vectors
// of rows. W is read where it lies, a few of its rows at a time, one number of each a step,
// broadcast: nothing of W is packed, and it goes by once for each panel. The low-rank update is the
// same loop with r in place of k. Every (m, n) owns one accumulator and one fixed order of
// additions, whatever the tile: a row's bits depend on neither the other rows nor the split over
// threads. Sums of kBlock steps are added up one after the other, as one long sum would lose its
// last bits step by step.
//
// The result of a tile is turned as well; it is turned back, sixteen columns at a time, when it is
// rounded and stored. Rows past the last are zero in the panel and are not stored.
#include <type_traits>

#include "linear_jobs.h"
#include "lora_kernels/simd.h"

namespace lora_kernels {
namespace LK_ISA {
namespace {

constexpr int64_t kBlock = kTurnBlock;
constexpr int kPanelRows = kTurnRows;
constexpr int kVecs = kPanelRows / kLanes;
// Rows of W at a time: accumulators, one vector of x, and as many broadcasts in the registers.
#if defined(__AVX512F__)
constexpr int kWide = 8;
#else
constexpr int kWide = 3;
#endif

LK_INLINE int clip(int64_t n, int64_t most) { return static_cast<int>(n < most ? n : most); }

// acc[n] += the rows of a panel, [steps][kPanelRows], times w[n][0 .. steps).
template <int V, int NR>
LK_INLINE void add_steps(const float* panel, const float* const* w, int64_t steps,
                         vf (&acc)[NR][V]) {
  for (int64_t k = 0; k < steps; k++, panel += kPanelRows) {
    if (V == 1) {  // more rows of w than there are registers left for their broadcasts
      const vf xv = load(panel);
      LK_UNROLL
      for (int n = 0; n < NR; n++) acc[n][0] = fma(xv, broadcast(w[n][k]), acc[n][0]);
      continue;
    }
    vf wv[NR];
    LK_UNROLL
    for (int n = 0; n < NR; n++) wv[n] = broadcast(w[n][k]);
    LK_UNROLL
    for (int v = 0; v < V; v++) {
      const vf xv = load(panel + v * kLanes);
      LK_UNROLL
      for (int n = 0; n < NR; n++) acc[n][v] = fma(xv, wv[n], acc[n][v]);
    }
  }
}

// One row of w, widened where it is not float: [k, k + steps) of it.
template <class T>
LK_INLINE const float* floats(const T* w, int64_t steps, float* buffer) {
  int64_t k = 0;
  for (; k + kLanes <= steps; k += kLanes) store(buffer + k, load(w + k));
  for (; k < steps; k++) buffer[k] = to_float(w[k]);
  return buffer;
}
LK_INLINE const float* floats(const float* w, int64_t, float*) { return w; }

// out[n][kPanelRows] += `steps` steps of a panel times those of NR rows of w.
template <class T, int V, int NR>
LK_INLINE void tile(const float* panel, const T* w, int64_t w_stride, int64_t steps, float* out) {
  float wide[std::is_same<T, float>::value ? 1 : NR][kBlock];
  const float* rows[NR];
  LK_UNROLL
  for (int n = 0; n < NR; n++) {
    rows[n] = floats(w + n * w_stride, steps, wide[std::is_same<T, float>::value ? 0 : n]);
  }
  vf acc[NR][V];
  LK_UNROLL
  for (int n = 0; n < NR; n++) {
    LK_UNROLL
    for (int v = 0; v < V; v++) acc[n][v] = zero();
  }
  add_steps<V, NR>(panel, rows, steps, acc);
  LK_UNROLL
  for (int n = 0; n < NR; n++) {
    LK_UNROLL
    for (int v = 0; v < V; v++) {
      float* sum = out + n * kPanelRows + v * kLanes;
      store(sum, add(load(sum), acc[n][v]));
    }
  }
}

// out[n][kPanelRows] += a whole panel times `count` rows of w, a block of k after the other: the
// block of the panel stays in L1 while all of the rows pass.
template <class T, int V>
void add_product(const float* panel, const T* w, int64_t w_stride, int64_t K, int count,
                 float* out) {
  constexpr int kMost = V == 1 ? 2 * kWide : kWide;
  for (int64_t k = 0; k < K; k += kBlock, panel += kBlock * kPanelRows, w += kBlock) {
    const int64_t steps = K - k < kBlock ? K - k : kBlock;
    int n = 0;
    for (; n + kMost <= count; n += kMost) {
      tile<T, V, kMost>(panel, w + n * w_stride, w_stride, steps, out + n * kPanelRows);
    }
    for (; n + 2 <= count; n += 2) {
      tile<T, V, 2>(panel, w + n * w_stride, w_stride, steps, out + n * kPanelRows);
    }
    if (n < count) tile<T, V, 1>(panel, w + n * w_stride, w_stride, steps, out + n * kPanelRows);
  }
}

template <class T, class TB, int V>
void columns(const TurnJob& job, int64_t panel, int64_t n0, int count, float* out) {
  std::memset(out, 0, sizeof(float) * kPanelRows * static_cast<size_t>(count));
  add_product<TB, V>(static_cast<const float*>(job.h) + panel * job.R * kPanelRows,
                     static_cast<const TB*>(job.b) + n0 * job.b_stride, job.b_stride, job.R, count,
                     out);
  add_product<T, V>(static_cast<const float*>(job.panels) + panel * job.K * kPanelRows,
                    static_cast<const T*>(job.w) + n0 * job.w_stride, job.w_stride, job.K, count,
                    out);
}

// Sixteen columns of y at a time: turned back, the bias added, rounded.
template <class TY>
void store_columns(const TurnJob& job, int64_t panel, int64_t n0, int count, const float* out) {
  const int64_t m0 = panel * kPanelRows;
  const int rows = clip(job.M - m0, kPanelRows);
  const TY* bias = static_cast<const TY*>(job.bias);
  for (int n = 0; n < count; n += 16) {
    const int cols = clip(count - n, 16);
    vf add_on = zero();
    if (bias != nullptr) add_on = cols == 16 ? load(bias + n0 + n) : load_n(bias + n0 + n, cols);
    for (int v = 0; v * kLanes < rows; v++) {
      vf t[16];
      for (int i = 0; i < 16; i++) {
        t[i] = i < cols ? load(out + (n + i) * kPanelRows + v * kLanes) : zero();
      }
      transpose16(t);
      const int left = clip(rows - v * kLanes, kLanes);
      for (int i = 0; i < left; i++) {
        TY* y = static_cast<TY*>(job.y) + (m0 + v * kLanes + i) * job.y_stride + n0 + n;
        const vf sum = bias != nullptr ? add(t[i], add_on) : t[i];
        if (cols == 16) {
          store(y, sum);
        } else {
          store_n(y, sum, cols);
        }
      }
    }
  }
}

constexpr int kChunk = 48;            // columns of y made before they are turned back
constexpr int64_t kPanelsAtOnce = 2;  // that pass over all of W while they are in L2

template <class T, class TB>
void turn(const TurnJob& job, int64_t n0, int64_t n1) {
  float out[kChunk * kPanelRows];
  const int64_t panels = (job.M + kPanelRows - 1) / kPanelRows;
  for (int64_t first = 0; first < panels; first += kPanelsAtOnce) {
    for (int64_t n = n0; n < n1; n += kChunk) {
      const int count = clip(n1 - n, kChunk);
      for (int64_t p = first; p < panels && p < first + kPanelsAtOnce; p++) {
        if (job.M - p * kPanelRows > kLanes) {
          columns<T, TB, kVecs>(job, p, n, count, out);
        } else {
          columns<T, TB, 1>(job, p, n, count, out);
        }
        if (job.y_dtype == DType::f32) {
          store_columns<float>(job, p, n, count, out);
        } else {
          store_columns<T>(job, p, n, count, out);
        }
      }
    }
  }
}

template <class T>
void pack(const PackJob& job, int64_t k0, int64_t k1) {
  const vf s = broadcast(job.scale);
  const int64_t panels = (job.M + kPanelRows - 1) / kPanelRows;
  for (int64_t p = 0; p < panels; p++) {
    for (int v = 0; v < kVecs; v++) {
      const int64_t m0 = p * kPanelRows + v * kLanes;
      const int rows = job.M > m0 ? clip(job.M - m0, kLanes) : 0;
      const T* x = static_cast<const T*>(job.x) + m0 * job.x_stride;
      float* to = static_cast<float*>(job.panels) + p * job.K * kPanelRows + v * kLanes;
      for (int64_t k = k0; k < k1; k += 16) {
        const int cols = clip(k1 - k, 16);
        vf t[16];
        for (int i = 0; i < 16; i++) {
          const T* from = x + i * job.x_stride + k;
          t[i] = i >= rows ? zero() : mul(s, cols == 16 ? load(from) : load_n(from, cols));
        }
        transpose16(t);
        for (int i = 0; i < cols; i++) store(to + (k + i) * kPanelRows, t[i]);
      }
    }
  }
}

template <class T>
void turn_by_adapter(const TurnJob& job, int64_t n0, int64_t n1) {
  if (job.b_dtype == DType::f32) {
    turn<T, float>(job, n0, n1);
  } else {
    turn<T, T>(job, n0, n1);
  }
}

}  // namespace

void turn_kernel(const TurnJob& job, int64_t n0, int64_t n1) {
  switch (job.w_dtype) {
    case DType::f32:
      return turn<float, float>(job, n0, n1);
    case DType::f16:
      return turn_by_adapter<f16>(job, n0, n1);
    case DType::bf16:
      return turn_by_adapter<bf16>(job, n0, n1);
  }
}

void pack_kernel(const PackJob& job, int64_t k0, int64_t k1) {
  switch (job.x_dtype) {
    case DType::f32:
      return pack<float>(job, k0, k1);
    case DType::f16:
      return pack<f16>(job, k0, k1);
    case DType::bf16:
      return pack<bf16>(job, k0, k1);
  }
}

}  // namespace LK_ISA
}  // namespace lora_kernels
