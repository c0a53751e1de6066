// What one row's own adapter adds to its columns of y, where a product keeps 16 columns of a row in
// a vector: the turned form, on vectors and on tiles.
#pragma once

#include "linear_jobs.h"
#include "lora_kernels/simd.h"

namespace lora_kernels {
namespace LK_ISA {

// Of columns [n0, n0 + cols), cols <= 16.
template <class TB>
inline vf row_update(const RowUpdate& u, int64_t n0, int cols) {
  vf t[16];
  for (int i = 0; i < 16; i++) t[i] = zero();
  const TB* b = static_cast<const TB*>(u.b) + n0 * u.b_stride;
  const vf scale = broadcast(u.scale);
  for (int64_t r = 0; r < u.rank; r += kLanes) {
    const int ranks = static_cast<int>(u.rank - r < kLanes ? u.rank - r : kLanes);
    const vf h = mul(scale, load_n(u.h + r, ranks));
    for (int i = 0; i < cols; i++) t[i] = fma(h, load_n(b + i * u.b_stride + r, ranks), t[i]);
  }
  return hsum16(t);
}

// Asks for what it will read, while a product runs.
inline void fetch_update(const RowUpdate& u, DType b_dtype, int64_t n0, int cols) {
  if (u.rank <= 0) return;
  const char* p = element(u.b, n0 * u.b_stride, b_dtype);
  const char* end = element(u.b, (n0 + cols - 1) * u.b_stride + u.rank, b_dtype);
  for (; p < end; p += 64) __builtin_prefetch(p);
}

}  // namespace LK_ISA
}  // namespace lora_kernels
