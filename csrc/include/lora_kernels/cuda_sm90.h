// The fused linear layer on the units that only sm_90a has: what it takes, when it is the choice,
// and its launcher. Pure functions but for the launcher.
#pragma once

#include "cuda_linear.h"
#include "cuda_tile.h"

namespace lora_kernels {

constexpr int kSm90Rows = 128, kSm90Step = 64;

// Whether the copies can address a matrix of rows this long: adjacent columns, rows and their first
// at 16 bytes, no row in the one before it.
inline bool fits_sm90(const CudaMatrix& t, int64_t cols) {
  return t.col == 1 && t.row % 8 == 0 && t.row >= cols && t.row < int64_t{1} << 38 &&
         reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

// Whether the kernel can run this product. The adapters do not matter: rows without one have the
// same bits in every call.
inline bool fits_sm90(const CudaLinear& call) {
  const int64_t most = int64_t{1} << 31;
  return !call.add && call.m > 0 && call.n > 0 && call.k > 0 && call.m < most && call.n < most &&
         call.k < most && fits_sm90(call.x, call.k) &&
         fits_sm90(call.weight, call.turned ? call.n : call.k) &&
         fits_sm90(CudaMatrix{call.y, call.y_row, call.y_col}, call.n) && call.n % 8 == 0;
}

// Columns of the tile, 128 or 256 (rows: kSm90Rows); 0 where the sm_80 kernels are expected to be
// faster. Shares of the peak are of kernels of these kinds as their authors report them.
inline int cuda_sm90_cols(int64_t m, int64_t n, int64_t k, int64_t r, int sms) {
  const double others = cuda_tile_cost(m, n, cuda_tile(m, n, k, r, sms, false), sms) / 0.6;
  const double wide = cuda_tile_cost(m, n, {kSm90Rows, 256, 1}, 1, 1.0, sms);
  const double narrow = cuda_tile_cost(m, n, {kSm90Rows, 128, 1}, 1, 0.85, sms);
  if (others < wide && others < narrow) return 0;
  return wide <= narrow ? 256 : 128;
}

}  // namespace lora_kernels

extern "C" {
// Whether a device has these units, and this build kernels for them.
bool lk_cuda_is_sm90(int device);
// A call that fits_sm90(); `cols` as from cuda_sm90_cols.
const char* lk_cuda_linear_sm90(const lora_kernels::CudaLinear* args, lora_kernels::DType type,
                                int cols, int device, void* stream);
}
