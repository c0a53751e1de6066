// Row form of the shrink on tiles: out[m, r] = alpha * sum_k x[m, k] a[r, k] for many rows.
//
// A is packed (tile_product.h); the rows of x are read where they lie, or copied, without what the
// dropout mask drops. Long sums are made of parts, as one long sum would lose its last bits step by
// step.
#include "tile_product.h"

namespace lora_kernels {
namespace LK_ISA {
namespace {

constexpr int64_t kPart = 2048;

// The rows and columns of a product from number k on.
template <int P, int Q>
void sum(const Rows* rows, const bf16* const* columns, int64_t K, float* sums) {
  alignas(64) float part[2 * kSide * kSumStride];
  for (int64_t k = 0; k < K; k += kPart) {
    const int64_t left = K - k < kPart ? K - k : kPart;
    Rows r[2];
    const bf16* c[2];
    for (int i = 0; i < P; i++) {
      r[i] = rows[i];
      r[i].first += k / kStep * rows[i].next;
    }
    for (int i = 0; i < Q; i++) c[i] = columns[i] + k / kStep * kTile;
    zero_sums<P, Q>();
    multiply<P, Q>(r, c, left);
    store_sums<P, Q>(k == 0 ? sums : part);
    for (int64_t i = 0; k > 0 && i < P * kSide * kSumStride; i += kLanes) {
      store(sums + i, add(load(sums + i), load(part + i)));
    }
  }
}

}  // namespace

void shrink_kernel(const DotJob& job, int64_t m0, int64_t m1, int64_t R) {
  const Tiles tiles;
  const int64_t size = steps_of(job.K) * kTile, panels = (R + kSide - 1) / kSide;
  bf16* packed = static_cast<bf16*>(thread_scratch(0, 2 * size * panels));
  bf16* copies = static_cast<bf16*>(thread_scratch(1, 4 * (size + kTile)));
  const bf16* a = static_cast<const bf16*>(job.a);
  if (job.a_by_rows)
    pack_row_pairs({a, job.a_stride, nullptr, nullptr, 0}, 0, R, 0, job.K, packed, size);
  for (int64_t i = 0; i < panels && !job.a_by_rows; i++) {
    pack_columns(a, job.a_stride, i * kSide, clip(R - i * kSide, kSide), job.K, packed + i * size);
  }
  const RowSource x = {static_cast<const bf16*>(job.x), job.x_stride, job.rows, job.mask,
                       job.mask_stride};
  const vf alpha = broadcast(job.alpha);
  alignas(64) float sums[2 * kSide * kSumStride] = {};
  for (int64_t m = m0; m < m1; m += 2 * kSide) {
    const int count = clip(m1 - m, 2 * kSide), blocks = count > kSide ? 2 : 1;
    Rows rows[2];
    for (int i = 0; i < blocks; i++) {
      bf16* copy = copies + i * (size + kTile);
      rows[i] =
          take_rows(x, m + i * kSide, clip(count - i * kSide, kSide), job.K, copy + size, copy);
    }
    for (int64_t r = 0; r < R; r += 2 * kSide) {
      const int cols = clip(R - r, 2 * kSide);
      const bf16* panel = packed + r / kSide * size;
      const bf16* columns[2] = {panel, panel + size};
      with_tiles(blocks, cols > kSide ? 2 : 1,
                 [&](auto P, auto Q) { sum<P, Q>(rows, columns, job.K, sums); });
      for (int i = 0; i < count; i++) {
        float* out = job.out + x.row(m + i) * job.out_stride + r;
        const float* from = sums + i * kSumStride;
        store_n(out, mul(alpha, load(from)), clip(cols, kLanes));
        if (cols > kLanes) store_n(out + kLanes, mul(alpha, load(from + kLanes)), cols - kLanes);
      }
    }
  }
}

}  // namespace LK_ISA
}  // namespace lora_kernels
