// Panel form: y[m, n] += sum_r h[m, r] b[r, n], vectors along n.
//
// B is packed once per chunk of columns into panels of kPanel columns, r by r, so that the tile
// streams it in order: as floats, or as bf16 pairs (r, r + 1) for the dot instruction when B and y
// are bf16 (then s*h is rounded once to bf16). B stored (N, R) is transposed on the way by 16 x 16
// register transposes; stored (R, N) it is copied. A tile of rows keeps its accumulators over the
// whole rank and touches y once, with one rounding: first the update, then the dropout mask by
// selection, then the base product and the bias where the job has them. Rank padding exists in the
// packed copies only and is zero on both sides; nothing outside the live rank is ever read.
#include "add_panels.h"

namespace lora_kernels {
namespace LK_ISA {
namespace {

constexpr int64_t kChunkBytes = 256 << 10;  // packed B kept in L2 while all rows pass over it
constexpr int64_t kLongSum = 128;  // a longer sum is made of parts, for a smaller rounding error

template <class P>
int64_t steps_of(const Factors& f) {
  return (f.R + P::kRanks - 1) / P::kRanks;
}

// acc += the rows h[0 .. MR) at [r0, r1) times the same rows of a panel.
template <class P, int MR>
LK_INLINE void add_steps(const float* const* h, const float* panel, int64_t r0, int64_t r1,
                         vf (&acc)[MR][kVectors]) {
  for (int64_t r = r0; r < r1; r++) {
    typename P::V b[kVectors];
    LK_UNROLL
    for (int v = 0; v < kVectors; v++) b[v] = P::vec(panel + r * kPanel + v * kLanes);
    LK_UNROLL
    for (int m = 0; m < MR; m++) {
      const typename P::V hv = P::bcast(h[m] + r);
      LK_UNROLL
      for (int v = 0; v < kVectors; v++) acc[m][v] = P::mac(hv, b[v], acc[m][v]);
    }
  }
}

// The same as a sum of its own, added to acc at the end: steps that are small beside acc would
// lose their last bits one by one.
template <class P, int MR>
LK_INLINE void add_part(const float* const* h, const float* panel, int64_t steps,
                        vf (&acc)[MR][kVectors]) {
  vf before[MR][kVectors];
  LK_UNROLL
  for (int m = 0; m < MR; m++) {
    LK_UNROLL
    for (int v = 0; v < kVectors; v++) {
      before[m][v] = acc[m][v];
      acc[m][v] = zero();
    }
  }
  for (int64_t r = 0; r < steps; r += kLongSum) {
    add_steps<P, MR>(h, panel, r, r + kLongSum < steps ? r + kLongSum : steps, acc);
    LK_UNROLL
    for (int m = 0; m < MR; m++) {
      LK_UNROLL
      for (int v = 0; v < kVectors; v++) {
        before[m][v] = add(before[m][v], acc[m][v]);
        acc[m][v] = zero();
      }
    }
  }
  LK_UNROLL
  for (int m = 0; m < MR; m++) {
    LK_UNROLL
    for (int v = 0; v < kVectors; v++) acc[m][v] = before[m][v];
  }
}

// A few rows of both h, ready for broadcasting, and their places in y.
struct Rows {
  int count;
  int64_t row[kRows];
  const float* update[kRows];
  const float* base[kRows];
};

// The rows against one panel of columns [n0, n0 + cols): update, mask, base, bias, y. MR >= count.
// kPlain: a short update alone; the sums then never leave the registers.
template <class P, class TY, int MR, bool kPlain>
void add_tile(const AddJob& job, const Rows& rows, int64_t n0, int cols, const float* panel) {
  vf acc[MR][kVectors];
  LK_UNROLL
  for (int m = 0; m < MR; m++) {
    LK_UNROLL
    for (int v = 0; v < kVectors; v++) acc[m][v] = zero();
  }
  const int64_t steps = steps_of<P>(job.update), base_steps = kPlain ? 0 : steps_of<P>(job.base);
  if (kPlain || steps <= kLongSum) {
    add_steps<P, MR>(rows.update, panel, 0, steps, acc);
  } else {
    add_part<P, MR>(rows.update, panel, steps, acc);
  }
  if (!kPlain && job.mask != nullptr) {
    LK_UNROLL
    for (int m = 0; m < MR; m++) {
      const uint8_t* bits = job.mask + rows.row[m] * job.mask_stride + n0 / 8;
      LK_UNROLL
      for (int v = 0; v < kVectors; v++) {
        const int left = cols - v * kLanes;
        if (left <= 0) break;
        uint16_t kept = bits[2 * v];
        if (left > 8) std::memcpy(&kept, bits + 2 * v, 2);
        acc[m][v] = keep(acc[m][v], kept);
      }
    }
  }
  if (base_steps > 0) add_part<P, MR>(rows.base, panel + steps * kPanel, base_steps, acc);
  const TY* bias = kPlain ? nullptr : static_cast<const TY*>(job.bias);
  LK_UNROLL
  for (int m = 0; m < MR; m++) {
    if (m >= rows.count) break;
    TY* y = static_cast<TY*>(job.y) + rows.row[m] * job.y_stride + n0;
    if (cols == kPanel && bias == nullptr) {
      if (job.accumulate) {
        LK_UNROLL
        for (int v = 0; v < kVectors; v++) acc[m][v] = add(load(y + v * kLanes), acc[m][v]);
      }
      store_row(y, acc[m]);
      continue;
    }
    LK_UNROLL
    for (int v = 0; v < kVectors; v++) {
      const int left = cols - v * kLanes;
      if (left <= 0) break;
      vf sum = acc[m][v];
      TY* p = y + v * kLanes;
      if (left >= kLanes) {
        if (bias != nullptr) sum = add(sum, load(bias + n0 + v * kLanes));
        store(p, job.accumulate ? add(load(p), sum) : sum);
      } else {
        if (bias != nullptr) sum = add(sum, load_n(bias + n0 + v * kLanes, left));
        store_n(p, job.accumulate ? add(load_n(p, left), sum) : sum, left);
      }
    }
  }
}

template <class P, class TY>
void add_rows(const AddJob& job, int64_t m0, int count, int64_t n0, int64_t n1, float* packed,
              const float* panels) {
  const int64_t steps = steps_of<P>(job.update), base_steps = steps_of<P>(job.base);
  const int64_t stride = (steps + 15) / 16 * 16, base_stride = (base_steps + 15) / 16 * 16;
  float* packed_base = packed + stride * kRows;
  Rows rows;
  rows.count = count;
  for (int m = 0; m < kRows; m++) {
    if (m >= count) {
      rows.row[m] = rows.row[count - 1];
      rows.update[m] = rows.update[count - 1];
      rows.base[m] = rows.base[count - 1];
      continue;
    }
    const int64_t row = job.rows ? job.rows[m0 + m] : m0 + m;
    rows.row[m] = row;
    P::pack_row(static_cast<const float*>(job.update.h) + row * job.update.h_stride, job.update.R,
                job.scale, packed + m * stride);
    rows.update[m] = packed + m * stride;
    const TY* h = static_cast<const TY*>(job.base.h) + row * job.base.h_stride;
    if (P::in_place(job.base)) {
      rows.base[m] = reinterpret_cast<const float*>(h);
    } else {
      P::pack_row(h, job.base.R, 1.0f, packed_base + m * base_stride);
      rows.base[m] = packed_base + m * base_stride;
    }
  }
  const bool plain =
      steps <= kLongSum && base_steps == 0 && job.mask == nullptr && job.bias == nullptr;
  for (int64_t n = n0; n < n1; n += kPanel) {
    const float* panel = panels + (n - n0) * (steps + base_steps);
    const int cols = clip(n1 - n, kPanel);
    if (count == 1) {
      add_tile<P, TY, 1, false>(job, rows, n, cols, panel);
    } else if (count == 2) {
      add_tile<P, TY, 2, false>(job, rows, n, cols, panel);
    } else if (plain) {
      add_tile<P, TY, kRows, true>(job, rows, n, cols, panel);
    } else {
      add_tile<P, TY, kRows, false>(job, rows, n, cols, panel);
    }
  }
}

template <class P, class TY>
void add_chunks(const AddJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const int64_t steps = steps_of<P>(job.update), base_steps = steps_of<P>(job.base);
  const int64_t panel_size = (steps + base_steps) * kPanel;
  const int64_t fit = kChunkBytes / (4 * panel_size + 1);
  const int64_t chunk = (fit > 1 ? fit : 1) * kPanel;
  const int64_t used = (n1 - n0 < chunk ? n1 - n0 + kPanel - 1 : chunk) / kPanel;
  float* panels = static_cast<float*>(thread_scratch(0, used * panel_size * 4));
  float* packed = static_cast<float*>(thread_scratch(1, (steps + base_steps + 32) * 4 * kRows));
  for (int64_t n = n0; n < n1; n += chunk) {
    const int64_t end = n + chunk < n1 ? n + chunk : n1;
    for (int64_t p = n; p < end; p += kPanel) {
      float* panel = panels + (p - n) / kPanel * panel_size;
      P::pack(job.update, p, clip(end - p, kPanel), panel);
      P::pack(job.base, p, clip(end - p, kPanel), panel + steps * kPanel);
    }
    for (int64_t m = m0; m < m1; m += kRows) {
      add_rows<P, TY>(job, m, clip(m1 - m, kRows), n, end, packed, panels);
    }
  }
}

template <class TB, class TY>
struct Panel {
  using type = FloatPanel<TB>;
};
#if LK_HAS_BF16_DOT
template <>
struct Panel<bf16, bf16> {
  using type = PairPanel;
};
#endif

template <class TY>
void add_by_b(const AddJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  switch (job.b_dtype) {
    case DType::f32:
      return add_chunks<typename Panel<float, TY>::type, TY>(job, m0, m1, n0, n1);
    case DType::f16:
      return add_chunks<typename Panel<f16, TY>::type, TY>(job, m0, m1, n0, n1);
    case DType::bf16:
      return add_chunks<typename Panel<bf16, TY>::type, TY>(job, m0, m1, n0, n1);
  }
}

template <class T>
void transpose_typed(T* out, int64_t out_stride, const T* b, int64_t b_stride, int64_t R,
                     int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += 16) {
    const int cols = clip(n1 - n, 16);
    for (int64_t r = 0; r < R; r += 16) {
      const int ranks = clip(R - r, 16);
      vf t[16];
      for (int i = 0; i < 16; i++) {
        t[i] = i < cols ? load_n(b + (n + i) * b_stride + r, ranks) : zero();
      }
      transpose16(t);
      for (int i = 0; i < ranks; i++) store_n(out + (r + i) * out_stride + n, t[i], cols);
    }
  }
}

}  // namespace

void add_kernel(const AddJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  switch (job.y_dtype) {
    case DType::f32:
      return add_by_b<float>(job, m0, m1, n0, n1);
    case DType::f16:
      return add_by_b<f16>(job, m0, m1, n0, n1);
    case DType::bf16:
      return add_by_b<bf16>(job, m0, m1, n0, n1);
  }
}

void transpose_kernel(void* out, int64_t out_stride, const void* b, int64_t b_stride, DType dtype,
                      int64_t R, int64_t n0, int64_t n1) {
  switch (dtype) {
    case DType::f32:
      return transpose_typed(static_cast<float*>(out), out_stride, static_cast<const float*>(b),
                             b_stride, R, n0, n1);
    case DType::f16:
      return transpose_typed(static_cast<f16*>(out), out_stride, static_cast<const f16*>(b),
                             b_stride, R, n0, n1);
    case DType::bf16:
      return transpose_typed(static_cast<bf16*>(out), out_stride, static_cast<const bf16*>(b),
                             b_stride, R, n0, n1);
  }
}

}  // namespace LK_ISA
}  // namespace lora_kernels
