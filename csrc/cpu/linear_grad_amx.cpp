// Gradient form on tiles: out[r, k] = alpha * sum_m g[m, r] keep[m, k] x[m, k], all bf16 but g.
//
// g is turned and rounded once to bf16, as the vector form does (linear_grad_isa.cpp): its ranks
// are the rows of the first operand. Pairs of rows of x are interleaved, kColumns columns and a
// block of rows at a time, and take all ranks while they are in the cache. A sum runs over m in
// order in one thread, so the result does not depend on the thread count.
#include "tile_product.h"

namespace lora_kernels {
namespace LK_ISA {
namespace {

constexpr int64_t kColumns = 256;  // of x at a time
constexpr int64_t kBlockRows = 512;

// g (M, R) as tiles [ceil(R / 16)][ceil(M / 32)][16 ranks][32 rows].
void turn(const GradJob& job, const RowSource& rows, bf16* out) {
  for (int64_t r = 0; r < job.R; r += kSide) {
    const int ranks = clip(job.R - r, kSide);
    for (int64_t m = 0; m < job.M; m += kStep, out += kTile) {
      vf t[2][16];
      for (int i = 0; i < kStep; i++) {
        t[i / 16][i % 16] =
            m + i < job.M ? load_n(job.g + rows.row(m + i) * job.g_stride + r, ranks) : zero();
      }
      transpose16(t[0]);
      transpose16(t[1]);
      for (int i = 0; i < kSide; i++) {
        store_pairs(out + i * kStep, narrow_pairs(t[0][i], t[1][i]));
      }
    }
  }
}

// Ranks [r0, r0 + ranks) and columns [k0, k0 + cols), both at most 32.
void write(const GradJob& job, const float* sums, int64_t r0, int ranks, int64_t k0, int cols) {
  bf16* out = static_cast<bf16*>(job.out);
  const vf alpha = broadcast(job.alpha);
  for (int i = 0; i < ranks; i += 16) {
    const int rows = clip(ranks - i, 16);
    for (int j = 0; j < cols; j += 16) {
      const int n = clip(cols - j, 16);
      vf t[16];
      for (int l = 0; l < 16; l++) t[l] = mul(alpha, load(sums + (i + l) * kSumStride + j));
      if (job.transposed) {
        transpose16(t);
        for (int l = 0; l < n; l++) {
          store_n(out + (k0 + j + l) * job.out_stride + r0 + i, t[l], rows);
        }
      } else {
        for (int l = 0; l < rows; l++) {
          store_n(out + (r0 + i + l) * job.out_stride + k0 + j, t[l], n);
        }
      }
    }
  }
}

}  // namespace

void grad_kernel(const GradJob& job, int64_t k0, int64_t k1) {
  const Tiles tiles;
  const int64_t steps = steps_of(job.M), panels = (job.R + kSide - 1) / kSide;
  const int64_t block_steps = steps < kBlockRows / kStep ? steps : kBlockRows / kStep;
  const int64_t apart = block_steps * kTile, pairs = (panels + 1) / 2;
  constexpr int64_t kSums = 2 * kSide * kSumStride;
  // Scratch: sums of a pair of panels of ranks and 32 columns, packed x; turned g.
  float* sums = static_cast<float*>(
      thread_scratch(0, 4 * kSums * pairs * (kColumns / 32) + 2 * apart * (kColumns / kSide)));
  bf16* packed = reinterpret_cast<bf16*>(sums + kSums * pairs * (kColumns / 32));
  bf16* g = static_cast<bf16*>(thread_scratch(1, 2 * panels * steps * kTile));
  const RowSource x = {static_cast<const bf16*>(job.x), job.x_stride, job.rows, job.mask,
                       job.mask_stride};
  turn(job, x, g);
  for (int64_t k = k0; k < k1; k += kColumns) {
    const int64_t end = k + kColumns < k1 ? k + kColumns : k1;
    for (int64_t m = 0; m == 0 || m < job.M; m += kBlockRows) {
      const int64_t rows = job.M - m < kBlockRows ? job.M - m : kBlockRows;
      pack_row_pairs(x, k, end, m, rows, packed, apart);
      for (int64_t pair = 0; pair < pairs; pair++) {
        Rows ranks[2];
        const int p = clip(panels - 2 * pair, 2);
        for (int i = 0; i < p; i++) {
          ranks[i] = {g + ((2 * pair + i) * steps + m / kStep) * kTile, kTileRowBytes, kTile,
                      nullptr};
        }
        for (int64_t c = k; c < end; c += 32) {
          const bf16* panel = packed + (c - k) / kSide * apart;
          const bf16* columns[2] = {panel, panel + apart};
          float* sum = sums + (pair * (kColumns / 32) + (c - k) / 32) * kSums;
          with_tiles(p, end - c > kSide ? 2 : 1, [&](auto P, auto Q) {
            if (m == 0) {
              zero_sums<P, Q>();
            } else {
              load_sums<P, Q>(sum);
            }
            multiply<P, Q>(ranks, columns, whole(rows, kStep));
            store_sums<P, Q>(sum);
          });
          if (m + kBlockRows >= job.M) {
            write(job, sum, 32 * pair, clip(job.R - 32 * pair, 32), c, clip(end - c, 32));
          }
        }
      }
    }
  }
}

}  // namespace LK_ISA
}  // namespace lora_kernels
