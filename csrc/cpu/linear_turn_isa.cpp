// Turned form: y[m, n] = sum_k x[m, k] w[n, k] + s sum_r h[m, r] b[n, r] + bias[n], vectors along
// m.
//
// x is packed once, turned: panels of 16 rows, k by k, so that a step of k is a vector of rows;
// with the bf16 dot instruction a step is a pair of k. Up to three panels meet a few rows of W at a
// time, which are read where they lie, one step of each, broadcast: nothing of W is packed, and it
// goes by once for every kPanelsAtOnce panels, asked for a block of k ahead. The low-rank update is
// the same loop with r in place of k; where rows have adapters of their own it joins when they are
// stored. Every (m, n) owns one accumulator and one fixed order of additions, whatever the tile: a
// row's bits depend on neither the other rows nor the split over threads. Sums of kBlock steps are
// added up one after the other, as one long sum would lose its last bits step by step.
//
// The result of a tile is turned as well; it is turned back, sixteen columns at a time, when it is
// rounded and stored. Rows past the last are zero in the panel and are not stored.
#include "row_update.h"
#include "turn_steps.h"

namespace lora_kernels {
namespace LK_ISA {
namespace {

constexpr int kChunk = 48;            // columns of y made before they are turned back
constexpr int64_t kPanelsAtOnce = 4;  // that pass over a chunk of W

// acc[n] += the rows of V panels, `apart` words from one another, times as many steps of row n of
// w.
template <class S, int V, int NR>
LK_INLINE void add_steps(const float* panel, int64_t apart, const typename S::Row* w, int64_t steps,
                         vf (&acc)[NR][V]) {
  int64_t k = 0;
  if constexpr (V == 1) {
    k = S::add_fours(panel, w, steps, acc);
    panel += k * kLanes;
  }
  for (; k < steps; k++, panel += kLanes) {
    if (V == 1 || S::kHoldsX) {
      typename S::V xv[V];
      LK_UNROLL
      for (int v = 0; v < V; v++) xv[v] = S::vec(panel + v * apart);
      LK_UNROLL
      for (int n = 0; n < NR; n++) {
        const typename S::V wv = S::bcast(w[n], k);
        LK_UNROLL
        for (int v = 0; v < V; v++) acc[n][v] = S::mac(xv[v], wv, acc[n][v]);
      }
      continue;
    }
    typename S::V wv[NR];
    LK_UNROLL
    for (int n = 0; n < NR; n++) wv[n] = S::bcast(w[n], k);
    LK_UNROLL
    for (int v = 0; v < V; v++) {
      const typename S::V xv = S::vec(panel + v * apart);
      LK_UNROLL
      for (int n = 0; n < NR; n++) acc[n][v] = S::mac(xv, wv[n], acc[n][v]);
    }
  }
}

// Some numbers of k of W's rows: where the first row has them, how many, how far from them lie
// those that the same rows will want next, and whether the rows crowd into few sets of L1.
template <class T>
struct Block {
  const T* w;
  int64_t stride, count, ahead;
  bool crowded;
};

// out[v][n][16] += those numbers of V panels times those of NR rows, from row n0 on.
template <class S, int V, int NR>
LK_INLINE void tile(const float* panel, int64_t apart, const Block<typename S::W>& block, int n0,
                    float* out) {
  typename S::Buffer buffers[NR];
  typename S::Row rows[NR];
  LK_UNROLL
  for (int n = 0; n < NR; n++) {
    rows[n] = S::row(block.w + (n0 + n) * block.stride, block.count, buffers[n]);
  }
  vf acc[NR][V];
  LK_UNROLL
  for (int n = 0; n < NR; n++) {
    LK_UNROLL
    for (int v = 0; v < V; v++) acc[n][v] = zero();
  }
  const int64_t steps = block.count / S::kSize;
  for (int64_t k = 0; k < steps; k += S::kLine) {
    typename S::Row at[NR];
    LK_UNROLL
    for (int n = 0; n < NR; n++) {
      at[n] = rows[n] + k * S::kSize;
      S::fetch(at[n], block.ahead);
    }
    add_steps<S, V, NR>(panel + k * kLanes, apart, at, steps - k < S::kLine ? steps - k : S::kLine,
                        acc);
  }
  if (steps * S::kSize < block.count) {
    LK_UNROLL
    for (int n = 0; n < NR; n++) rows[n] = S::last(rows[n] + steps * S::kSize, buffers[n]);
    add_steps<S, V, NR>(panel + steps * kLanes, apart, rows, 1, acc);
  }
  LK_UNROLL
  for (int n = 0; n < NR; n++) {
    LK_UNROLL
    for (int v = 0; v < V; v++) {
      float* sum = out + (v * kChunk + n0 + n) * kLanes;
      store(sum, add(load(sum), acc[n][v]));
    }
  }
}

constexpr int kWays = 8;  // lines in a set of L1

// The same for `rows` rows.
template <class S, int V>
void add_block(const float* panel, int64_t apart, const Block<typename S::W>& block, int rows,
               float* out) {
  constexpr int kMost = S::wide(V);
  int n = 0;
  if constexpr (kMost > kWays) {
    for (; block.crowded && n + kWays <= rows; n += kWays) {
      tile<S, V, kWays>(panel, apart, block, n, out);
    }
  }
  for (; n + kMost <= rows; n += kMost) tile<S, V, kMost>(panel, apart, block, n, out);
  for (; n + 2 <= rows; n += 2) tile<S, V, 2>(panel, apart, block, n, out);
  if (n < rows) tile<S, V, 1>(panel, apart, block, n, out);
}

// out[p][n][16] += `panels` panels of x, each of K numbers a row, times `rows` rows of w, a block
// of k after the other: a block of w stays in L1 while the panels pass.
template <class S>
void add_product(const float* x, int64_t K, int panels, const typename S::W* w, int64_t w_stride,
                 int rows, float* out) {
  constexpr int64_t kNumbers = kBlock * S::kSize;
  const int64_t apart = S::steps(K) * kLanes;
  for (int64_t k = 0; k < K; k += kNumbers) {
    // Past the last block comes the first one of the next chunk.
    const Block<typename S::W> block = {w + k, w_stride, K - k < kNumbers ? K - k : kNumbers,
                                        k + kNumbers < K ? kNumbers : kChunk * w_stride - k,
                                        S::crowded(w_stride)};
    const float* at = x + k / S::kSize * kLanes;
    for (int p = 0; p < panels;) {
      float* sums = out + p * kChunk * kLanes;
      const int left = panels - p;
      if (left == 1) {
        add_block<S, 1>(at + p * apart, apart, block, rows, sums);
        p += 1;
      } else if (left == 3) {
        add_block<S, 3>(at + p * apart, apart, block, rows, sums);
        p += 3;
      } else {
        add_block<S, 2>(at + p * apart, apart, block, rows, sums);
        p += 2;
      }
    }
  }
}

// The rows of a panel, sixteen columns at a time: turned back, a row's own update and the bias
// added, rounded.
template <class TY, class TB>
void store_columns(const TurnJob& job, int64_t panel, int64_t n0, int count, const float* out) {
  const int64_t m0 = panel * kLanes;
  const int rows = clip(job.M - m0, kLanes);
  const TY* bias = static_cast<const TY*>(job.bias);
  for (int n = 0; n < count; n += 16) {
    const int cols = clip(count - n, 16);
    vf add_on = zero();
    if (bias != nullptr) add_on = cols == 16 ? load(bias + n0 + n) : load_n(bias + n0 + n, cols);
    vf t[16];
    for (int i = 0; i < 16; i++) t[i] = i < cols ? load(out + (n + i) * kLanes) : zero();
    transpose16(t);
    for (int i = 0; i < rows; i++) {
      vf sum = t[i];
      if (job.updates != nullptr && job.updates[m0 + i].rank > 0) {
        sum = add(sum, row_update<TB>(job.updates[m0 + i], n0 + n, cols));
      }
      if (bias != nullptr) sum = add(sum, add_on);
      TY* y = static_cast<TY*>(job.y) + (m0 + i) * job.y_stride + n0 + n;
      if (cols == 16) {
        store(y, sum);
      } else {
        store_n(y, sum, cols);
      }
    }
  }
}

// S multiplies x and w, SB h and b.
template <class S, class SB>
void turn(const TurnJob& job, int64_t n0, int64_t n1) {
  using TW = typename S::W;
  using TB = typename SB::W;
  float out[kPanelsAtOnce * kChunk * kLanes];
  const int64_t all = (job.M + kLanes - 1) / kLanes;
  for (int64_t first = 0; first < all; first += kPanelsAtOnce) {
    const int panels = clip(all - first, kPanelsAtOnce);
    const float* x = static_cast<const float*>(job.panels) + first * S::steps(job.K) * kLanes;
    const float* h = static_cast<const float*>(job.h) + first * SB::steps(job.R) * kLanes;
    for (int64_t n = n0; n < n1; n += kChunk) {
      const int count = clip(n1 - n, kChunk);
      std::memset(out, 0, sizeof(float) * static_cast<size_t>(panels * kChunk * kLanes));
      const int64_t end = (first + panels) * kLanes;
      for (int64_t m = first * kLanes; job.updates != nullptr && m < job.M && m < end; m++) {
        fetch_update(job.updates[m], job.b_dtype, n, count);
      }
      add_product<SB>(h, job.R, panels, static_cast<const TB*>(job.b) + n * job.b_stride,
                      job.b_stride, count, out);
      add_product<S>(x, job.K, panels, static_cast<const TW*>(job.w) + n * job.w_stride,
                     job.w_stride, count, out);
      for (int p = 0; p < panels; p++) {
        const float* sums = out + p * kChunk * kLanes;
        if (job.y_dtype == DType::f32) {
          store_columns<float, TB>(job, first + p, n, count, sums);
        } else {
          store_columns<TW, TB>(job, first + p, n, count, sums);
        }
      }
    }
  }
}

template <class S, class TX>
void pack(const PackJob& job, int64_t k0, int64_t k1) {
  for (int64_t m0 = 0; m0 < job.M; m0 += kLanes) {
    const int rows = clip(job.M - m0, kLanes);
    const TX* x = static_cast<const TX*>(job.x) + m0 * job.x_stride;
    float* to = static_cast<float*>(job.panels) + m0 * S::steps(job.K);
    for (int64_t k = k0; k < k1; k += 16 * S::kSize) {
      const int count = clip(k1 - k, 16 * S::kSize);
      vf t[16];
      const int steps = S::take(x + k, job.x_stride, rows, count, job.scale, t);
      transpose16(t);
      for (int i = 0; i < steps; i++) store(to + (k / S::kSize + i) * kLanes, t[i]);
    }
  }
}

template <class T>
void turn_by_adapter(const TurnJob& job, int64_t n0, int64_t n1) {
  if (job.b_dtype == DType::f32) {
    turn<Steps<T>, Steps<float>>(job, n0, n1);
  } else {
    turn<Steps<T>, Steps<T>>(job, n0, n1);
  }
}

template <class T>
void pack_for(const PackJob& job, int64_t k0, int64_t k1) {
  if (job.x_dtype == DType::f32) {
    pack<Steps<T>, float>(job, k0, k1);
  } else {
    pack<Steps<T>, T>(job, k0, k1);
  }
}

}  // namespace

void turn_kernel(const TurnJob& job, int64_t n0, int64_t n1) {
  switch (job.w_dtype) {
    case DType::f32:
      return turn_by_adapter<float>(job, n0, n1);
    case DType::f16:
      return turn_by_adapter<f16>(job, n0, n1);
    case DType::bf16:
      return turn_by_adapter<bf16>(job, n0, n1);
  }
}

void pack_kernel(const PackJob& job, int64_t k0, int64_t k1) {
  switch (job.w_dtype) {
    case DType::f32:
      return pack_for<float>(job, k0, k1);
    case DType::f16:
      return pack_for<f16>(job, k0, k1);
    case DType::bf16:
      return pack_for<bf16>(job, k0, k1);
  }
}

}  // namespace LK_ISA
}  // namespace lora_kernels
