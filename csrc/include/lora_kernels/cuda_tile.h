// Which tile a CUDA GEMM runs with: a pure function of the sizes and the GPU, on the host.
#pragma once

#include <cstdint>

namespace lora_kernels {

struct CudaTile {
  int rows, cols;  // of the product
  int splits;      // parts of the sum for h, added in ascending order
};

constexpr int kMaxSplits = 8;

// What a product takes with a tile of which `resident` run on a multiprocessor at `share` of its
// peak: the waves times the work of one multiprocessor in a wave. A wave that is not full costs
// what its busiest multiprocessor does.
inline double cuda_tile_cost(int64_t m, int64_t n, const CudaTile& tile, int resident, double share,
                             int sms) {
  const int64_t tiles = (m + tile.rows - 1) / tile.rows * ((n + tile.cols - 1) / tile.cols);
  const int64_t at_once = static_cast<int64_t>(sms) * resident;
  const int64_t full = tiles / at_once, rest = tiles % at_once;
  const double deep = static_cast<double>(full * resident + (rest + sms - 1) / sms);
  return deep * tile.rows * tile.cols / share;
}

// The same for the tiles of cuda_tile.
inline double cuda_tile_cost(int64_t m, int64_t n, const CudaTile& tile, int sms) {
  const double share = tile.rows == 128 ? 1.0 : tile.rows == 64 ? 0.75 : 0.3;
  return cuda_tile_cost(m, n, tile, tile.rows == 128 ? 1 : 4, share, sms);
}

// m, n, k, r as in x (m, k), weight (n, k), rank r; `sms` multiprocessors. With `invariant` what
// decides how a sum is cut does not depend on m.
//
// Smaller tiles do the same work with more traffic. The result of a product does not depend on the
// tile: every sum runs over k in steps of 16, ascending.
inline CudaTile cuda_tile(int64_t m, int64_t n, int64_t k, int64_t r, int sms, bool invariant) {
  constexpr CudaTile kKinds[] = {{128, 128, 1}, {64, 64, 1}, {16, 64, 1}};
  CudaTile best = {16, 64, 1};
  double least = 0;
  for (const CudaTile& kind : kKinds) {
    const double cost = cuda_tile_cost(m, n, kind, sms);
    if (least == 0 || cost < least) {
      least = cost;
      best = kind;
    }
  }
  // h has few tiles: its sum is cut until they fill the GPU, into no less than 512 each.
  if (!invariant) {
    const int64_t tiles = (m + 63) / 64 * ((r + 63) / 64);
    while (best.splits < kMaxSplits && tiles * best.splits < sms && k / (2 * best.splits) >= 512) {
      best.splits *= 2;
    }
  }
  return best;
}

// Parts into which the sum over k is cut for few rows (CudaDecode), 0 where that kernel is not for
// the call. With `invariant` it never is: many rows have their sums in one part.
//
// Bound by the stream of the weight, so what counts is the share of it that the busiest
// multiprocessor reads; one block alone does not have enough of it under way. A part is no less
// than 512 long, and each costs a little. Does not depend on the rank: rows without an adapter have
// the same bits as where there is none.
inline int cuda_decode_parts(int64_t m, int64_t n, int64_t k, int sms, bool invariant) {
  if (invariant || m < 1 || m > 64 || n < 1 || k < 1) return 0;
  const int64_t tiles = (n + 63) / 64;
  int best = 1;
  double least = 0;
  for (int parts = 1; parts <= kMaxSplits && (parts == 1 || k / parts >= 512); ++parts) {
    const int64_t deep = (tiles * parts + sms - 1) / sms;
    const double cost =
        static_cast<double>(deep) / parts * (deep < 2 ? 1.15 : 1) * (1 + 0.01 * parts);
    if (least == 0 || cost < least) {
      least = cost;
      best = parts;
    }
  }
  return best;
}

// Parts into which the sum over m rows is cut for the gradient of an adapter's matrix of `r` times
// `cols` (CudaGradient): until its tiles are two a multiprocessor, into no less than 256 rows each.
inline int cuda_gradient_parts(int64_t m, int64_t r, int64_t cols, int sms) {
  const int64_t tiles = (r + 63) / 64 * ((cols + 63) / 64);
  int parts = 1;
  while (parts < 16 && tiles * parts < int64_t{2} * sms && m / (2 * parts) >= 256) parts *= 2;
  return parts;
}

}  // namespace lora_kernels
