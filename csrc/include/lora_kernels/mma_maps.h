// Where elements lie: in the fragments of mma.sync m16n8k16, for the lanes that name rows to
// ldmatrix, and in the swizzled tiles of shared memory. Pure functions, the same on host and
// device; the host tests that they cover every element once and that no eight lanes meet in a bank.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LK_MAP __host__ __device__ constexpr
#else
#define LK_MAP constexpr
#endif

namespace lora_kernels {
namespace maps {

// Row and column of accumulator i (0 to 3) of a lane, in 16 x 8.
LK_MAP int acc_row(int lane, int i) { return lane / 4 + (i < 2 ? 0 : 8); }
LK_MAP int acc_col(int lane, int i) { return lane % 4 * 2 + i % 2; }

// The row, and the run of eight elements, that a lane names so that four ldmatrix matrices are the
// left operand (16 rows, 16 along the sum), ...
LK_MAP int left_row(int lane) { return lane % 16; }
LK_MAP int left_run(int lane) { return lane / 16; }
// ... or the right operand for two products side by side: stored as 16 columns of the product by 16
// along the sum, ...
LK_MAP int right_row(int lane) { return lane % 8 + lane / 16 * 8; }
LK_MAP int right_run(int lane) { return lane / 8 % 2; }
// ... or turned, as 16 along the sum by 16 columns (ldmatrix.trans).
LK_MAP int turned_row(int lane) { return lane % 16; }
LK_MAP int turned_run(int lane) { return lane / 16; }

// Byte offset of run `run` (16 bytes) of row `row` in a tile whose rows have kRuns of them: 4, or 8
// and more. Eight neighbouring rows of one run are in eight different sixteen-byte banks.
template <int kRuns>
LK_MAP int tile_offset(int row, int run) {
  static_assert(kRuns == 4 || kRuns % 8 == 0, "rows of 64 bytes, or of whole 128 bytes");
  return (row * kRuns + (run ^ (kRuns == 4 ? row / 2 % 4 : row % 8))) * 16;
}

// Row and column of tile `index` in a grid of rows x cols tiles, in bands of eight rows: tiles that
// run at one time share their operands in L2.
struct TileAt {
  int row, col;
};
LK_MAP TileAt tile_at(int64_t index, int rows, int cols) {
  const int64_t band = int64_t{8} * cols;
  const int first = static_cast<int>(index / band) * 8;
  const int high = rows - first < 8 ? rows - first : 8;
  const int in_band = static_cast<int>(index % band);
  return {first + in_band % high, in_band / high};
}

}  // namespace maps
}  // namespace lora_kernels
