// Turned form on tiles: y[m, n] = sum_k x[m, k] w[n, k] + s sum_r h[m, r] b[n, r] + bias[n].
//
// The rows of W and of B are the first operand and are read where they lie, W once from memory; x
// and s h are packed (tile_product.h), which the turned form asks for in any case. A block of W's
// rows stays in L2 while all of x passes, 32 rows of x and 32 of W at a time, in four tiles of sums
// that take the update first and then the base product. The result is turned back when it is
// rounded, once.
#include "row_update.h"
#include "tile_product.h"

namespace lora_kernels {
namespace LK_ISA {
namespace {

constexpr int64_t kChunkBytes = 1 << 20;  // of W, half of L2
constexpr int64_t kMostRows = 256;        // of W in a chunk

int64_t chunk_rows(const TurnJob& job) {
  const int64_t fit = kChunkBytes / (2 * (job.K + job.R) + 1) / 32 * 32;
  return fit < 32 ? 32 : fit > kMostRows ? kMostRows : fit;
}

// Where rows [0, count) of a chunk lie, 16 a block.
struct Chunk {
  Rows w[kMostRows / kSide], b[kMostRows / kSide];
};

const bf16* panel(const void* panels, int64_t K, int64_t block) {
  return static_cast<const bf16*>(panels) + block * steps_of(K) * kTile;
}

// Adds what a row's own adapter gives to 32 columns.
void add_update(const TurnJob& job, const RowUpdate& u, int64_t n0, int cols, vf* lo, vf* hi) {
  if (u.rank <= 0) return;
  const bool wide = job.b_dtype == DType::f32;
  const auto part = [&](int64_t n, int count) {
    return wide ? row_update<float>(u, n, count) : row_update<bf16>(u, n, count);
  };
  *lo = add(*lo, part(n0, clip(cols, kSide)));
  if (cols > kSide) *hi = add(*hi, part(n0 + kSide, cols - kSide));
}

// Rows of x [m0, m0 + rows) and columns of y [n0, n0 + cols), from sums whose rows are the columns.
void write(const TurnJob& job, const float* sums, int64_t m0, int rows, int64_t n0, int cols) {
  const bf16* bias = static_cast<const bf16*>(job.bias);
  vf add_lo = zero(), add_hi = zero();
  if (bias != nullptr) {
    add_lo = load_n(bias + n0, clip(cols, kLanes));
    if (cols > kLanes) add_hi = load_n(bias + n0 + kLanes, cols - kLanes);
  }
  vf lo[16], hi[16];
  for (int i = 0; i < 16; i++) lo[i] = load(sums + i * kSumStride);
  for (int i = 0; i < 16; i++) {
    hi[i] = cols > kSide ? load(sums + (kSide + i) * kSumStride) : zero();
  }
  transpose16(lo);
  if (cols > kSide) transpose16(hi);
  for (int i = 0; i < rows; i++) {
    const int64_t at = (m0 + i) * job.y_stride + n0;
    vf a = lo[i], b = hi[i];
    if (job.updates != nullptr) add_update(job, job.updates[m0 + i], n0, cols, &a, &b);
    if (bias != nullptr) {
      a = add(a, add_lo);
      b = add(b, add_hi);
    }
    if (job.y_dtype == DType::f32) {
      float* y = static_cast<float*>(job.y) + at;
      store_n(y, a, clip(cols, kLanes));
      if (cols > kLanes) store_n(y + kLanes, b, cols - kLanes);
    } else if (cols == 2 * kLanes) {
      store_row(static_cast<bf16*>(job.y) + at, {a, b});
    } else {
      store_row_n(static_cast<bf16*>(job.y) + at, a, b, cols);
    }
  }
}

}  // namespace

void turn_kernel(const TurnJob& job, int64_t n0, int64_t n1) {
  const Tiles tiles;
  const int64_t chunk = chunk_rows(job), row_blocks = (job.M + kSide - 1) / kSide;
  const int64_t w_copy = steps_of(job.K) * kTile, b_copy = steps_of(job.R) * kTile;
  const RowSource w = {static_cast<const bf16*>(job.w), job.w_stride, nullptr, nullptr, 0};
  const RowSource b = {static_cast<const bf16*>(job.b), job.b_stride, nullptr, nullptr, 0};
  bf16* rests = static_cast<bf16*>(thread_scratch(0, 4 * kTile * (chunk / kSide)));
  bf16* copies = static_cast<bf16*>(thread_scratch(1, 2 * (w_copy + b_copy)));
  alignas(64) float sums[2 * kSide * kSumStride];
  for (int64_t n = n0; n < n1; n += chunk) {
    const int64_t end = n + chunk < n1 ? n + chunk : n1;
    Chunk c;
    for (int64_t i = 0; n + i * kSide < end; i++) {
      // Only the last block of a chunk can be short: one copy is enough.
      const int count = clip(end - n - i * kSide, kSide);
      bf16* rest = rests + 2 * i * kTile;
      c.w[i] = take_rows(w, n + i * kSide, count, job.K, rest, copies);
      if (job.R > 0) {
        c.b[i] = take_rows(b, n + i * kSide, count, job.R, rest + kTile, copies + w_copy);
      }
    }
    for (int64_t m = 0; m < row_blocks; m += 2) {
      const int q = clip(row_blocks - m, 2);
      const bf16* x[2] = {panel(job.panels, job.K, m), panel(job.panels, job.K, m + q - 1)};
      const bf16* h[2] = {panel(job.h, job.R, m), panel(job.h, job.R, m + q - 1)};
      for (int64_t i = n; i < end; i += 2 * kSide) {
        const int cols = clip(end - i, 2 * kSide);
        const int64_t block = (i - n) / kSide;
        for (int64_t r = m * kSide; job.updates != nullptr && r < job.M && r < (m + 2) * kSide;
             r++) {
          fetch_update(job.updates[r], job.b_dtype, i, cols);
        }
        with_tiles(cols > kSide ? 2 : 1, q, [&](auto P, auto Q) {
          zero_sums<P, Q>();
          if (job.R > 0) multiply<P, Q>(c.b + block, h, job.R);
          multiply<P, Q>(c.w + block, x, job.K);
          store_sums<P, Q>(sums);
        });
        for (int j = 0; j < q; j++) {
          const int64_t m0 = (m + j) * kSide;
          write(job, sums + j * kSide, m0, clip(job.M - m0, kSide), i, cols);
        }
      }
    }
  }
}

void pack_kernel(const PackJob& job, int64_t k0, int64_t k1) {
  const vf scale = broadcast(job.scale);
  for (int64_t m0 = 0; m0 < job.M; m0 += kSide) {
    const int rows = clip(job.M - m0, kSide);
    bf16* out = static_cast<bf16*>(job.panels) + m0 * whole(job.K, kStep);
    for (int64_t k = k0; k < k1; k += kStep) {
      const int left = clip(k1 - k, kStep);
      vf t[16];
      for (int i = 0; i < 16; i++) {
        const int64_t at = (m0 + i) * job.x_stride + k;
        if (i >= rows) {
          t[i] = zero();
        } else if (job.x_dtype == DType::bf16) {
          t[i] = as_floats(load_pairs_n(static_cast<const bf16*>(job.x) + at, left));
        } else {
          const float* x = static_cast<const float*>(job.x) + at;
          const vf lo = load_n(x, clip(left, kLanes));
          const vf hi = left > kLanes ? load_n(x + kLanes, left - kLanes) : zero();
          t[i] = as_floats(narrow_pairs(mul(scale, lo), mul(scale, hi)));
        }
      }
      store_turned(t, out + k / kStep * kTile);
    }
  }
}

}  // namespace LK_ISA
}  // namespace lora_kernels
