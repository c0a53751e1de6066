// Panel form on tiles: y[m, n] += keep[m, n] * scale * sum_r h[m, r] b[r, n], with the base product
// and the bias in the same pass (AddJob; the vector form is linear_add_isa.cpp).
//
// B and W are packed once per chunk of columns (tile_product.h). The rows of the base's h, x or dy,
// are read where they lie; the rows of the update are scaled and rounded once to bf16, as the
// vector form does. Tiles of 32 rows and 32 columns of y: first the update, then the dropout mask
// by selection, then the base product onto the same sums, then bias, y and one rounding.
#include "tile_product.h"

namespace lora_kernels {
namespace LK_ISA {
namespace {

constexpr int64_t kChunkBytes = 1 << 20;  // packed columns, half of L2
constexpr int64_t kMostColumns = 512;     // in a chunk

// Columns [n0, n1) of a factor: packed blocks of 16, `apart` from one another.
void pack(const Factors& f, int64_t n0, int64_t n1, bf16* out, int64_t apart) {
  const bf16* b = static_cast<const bf16*>(f.b);
  if (f.R <= 0) return;
  if (!f.by_columns) {
    const RowSource rows = {b, f.b_stride, nullptr, nullptr, 0};
    pack_row_pairs(rows, n0, n1, 0, f.R, out, apart);
    return;
  }
  for (int64_t n = n0; n < n1; n += kSide, out += apart) {
    pack_columns(b, f.b_stride, n, clip(n1 - n, kSide), f.R, out);
  }
}

// Up to 32 rows of y: where they are, and both first operands.
struct Block {
  int count = 0;
  int64_t row[2 * kSide];
  Rows update[2], base[2];
};

// Drops what the mask drops of a block's columns [n0, n0 + cols).
void apply_mask(const AddJob& job, const Block& block, int64_t n0, int cols, float* sums) {
  for (int i = 0; i < block.count; i++) {
    const uint32_t bits = load_bits(job.mask + block.row[i] * job.mask_stride + n0 / 8, cols);
    float* p = sums + i * kSumStride;
    store(p, keep(load(p), bits & 0xffff));
    if (cols > kLanes) store(p + kLanes, keep(load(p + kLanes), bits >> 16));
  }
}

void write(const AddJob& job, const Block& block, int64_t n0, int cols, const float* sums) {
  const bf16* bias = static_cast<const bf16*>(job.bias);
  const int low = clip(cols, kLanes), high = cols - low;
  for (int i = 0; i < block.count; i++) {
    bf16* y = static_cast<bf16*>(job.y) + block.row[i] * job.y_stride + n0;
    vf lo = load(sums + i * kSumStride);
    vf hi = high > 0 ? load(sums + i * kSumStride + kLanes) : zero();
    if (bias != nullptr) {
      lo = add(lo, load_n(bias + n0, low));
      if (high > 0) hi = add(hi, load_n(bias + n0 + kLanes, high));
    }
    if (job.accumulate) {
      lo = add(load_n(y, low), lo);
      if (high > 0) hi = add(load_n(y + kLanes, high), hi);
    }
    if (cols == 2 * kLanes) {
      store_row(y, {lo, hi});
    } else {
      store_row_n(y, lo, hi, cols);
    }
  }
}

}  // namespace

void add_kernel(const AddJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const Tiles tiles;
  const int64_t update = steps_of(job.update.R) * kTile, base = steps_of(job.base.R) * kTile;
  const int64_t fit = kChunkBytes / (2 * (update + base) / kSide + 1) / 32 * 32;
  int64_t chunk = fit < 32 ? 32 : fit > kMostColumns ? kMostColumns : fit;
  if (chunk > n1 - n0) chunk = whole(n1 - n0, 2 * kSide);
  bf16* panels = static_cast<bf16*>(thread_scratch(0, 2 * (update + base) * (chunk / kSide)));
  bf16* copies = static_cast<bf16*>(thread_scratch(1, 4 * (update + base + kTile)));
  const RowSource rows = {static_cast<const bf16*>(job.base.h), job.base.h_stride, job.rows,
                          nullptr, 0};
  const float* h = static_cast<const float*>(job.update.h);
  alignas(64) float sums[2 * kSide * kSumStride];
  for (int64_t n = n0; n < n1; n += chunk) {
    const int64_t end = n + chunk < n1 ? n + chunk : n1;
    pack(job.update, n, end, panels, update + base);
    pack(job.base, n, end, panels + update, update + base);
    for (int64_t m = m0; m < m1; m += 2 * kSide) {
      Block block;
      block.count = clip(m1 - m, 2 * kSide);
      for (int i = 0; i < block.count; i++) block.row[i] = rows.row(m + i);
      const int blocks = block.count > kSide ? 2 : 1;
      for (int i = 0; i < blocks; i++) {
        const int count = clip(block.count - i * kSide, kSide);
        bf16* copy = copies + i * (update + base + kTile);
        const auto row = [&](int j) { return h + block.row[i * kSide + j] * job.update.h_stride; };
        block.update[i] = narrow_rows(row, count, job.update.R, job.scale, copy);
        if (base > 0) {
          block.base[i] = take_rows(rows, m + i * kSide, count, job.base.R, copy + update + base,
                                    copy + update);
        }
      }
      for (int64_t p = n; p < end; p += 2 * kSide) {
        const int cols = clip(end - p, 2 * kSide);
        const bf16* panel = panels + (p - n) / kSide * (update + base);
        const bf16* b[2] = {panel, panel + update + base};
        const bf16* w[2] = {b[0] + update, b[1] + update};
        with_tiles(blocks, cols > kSide ? 2 : 1, [&](auto P, auto Q) {
          zero_sums<P, Q>();
          multiply<P, Q>(block.update, b, job.update.R);
          if (job.mask != nullptr) {
            store_sums<P, Q>(sums);
            apply_mask(job, block, p, cols, sums);
            if (base > 0) load_sums<P, Q>(sums);
          }
          if (base > 0) multiply<P, Q>(block.base, w, job.base.R);
          if (base > 0 || job.mask == nullptr) store_sums<P, Q>(sums);
        });
        write(job, block, p, cols, sums);
      }
    }
  }
}

}  // namespace LK_ISA
}  // namespace lora_kernels
