// Launchers of the fused linear layer on CUDA: raw pointers, sizes and a stream. No allocation, no
// waiting, no set-up: they can be captured in a CUDA graph, which keeps pointers and sizes. As CUDA
// loads a kernel when it is first launched, call once before capturing.
#pragma once

#include <cstdint>

#include "lora_kernels/cpu.h"  // DType

namespace lora_kernels {

// Element (i, j) is at data + i * row + j * col, counted in elements.
struct CudaMatrix {
  const void* data;
  int64_t row, col;
};

// Rows by slot, as BatchPlan has them (runtime plan); null pointers: one adapter for all rows.
struct CudaPlan {
  const int32_t* row_order;
  const int32_t* segment_starts;
  const int32_t* slot_ranks;  // or null: all of the rank is live
  int num_positions, num_slots;
  int32_t* row_slots;  // (m), room for each row's slot that the shrink fills; or null
};

// h (splits, m, r) = x (m, k) a^T in float32, a sum cut into `splits` parts. a is (r, k), or,
// `turned`, (k, r); with a plan (slots, r, k), and only rows of a slot are written. `cleared`, if
// not null, is a CudaDecode's `arrived` of the next launch.
struct CudaShrink {
  CudaMatrix x, a;
  int64_t a_slot;
  float* h;
  int64_t m, k, r;
  int splits;
  bool turned;
  CudaPlan plan;
  int* cleared;
  int num_cleared;
};

// y (m, n) = x (m, k) weight^T + bias + scaling * h b^T, rounded once; with `add`, y += all that.
// weight is (n, k), b (n, r), or, `turned`, (k, n) and (r, n); with a plan b is (slots, n, r). k or
// r may be 0. h is (splits, m, r), of which the parts are added, scaled and rounded to y's dtype.
struct CudaLinear {
  CudaMatrix x, weight, b;
  int64_t b_slot;
  const void* bias;  // or null
  int64_t bias_stride;
  const float* h;
  int64_t h_row, h_split;
  const float* scaling;  // one, or one a slot
  int64_t scaling_stride;
  void* y;
  int64_t y_row, y_col;
  int64_t m, n, k, r;
  int splits;
  bool turned, add;
  CudaPlan plan;
};

// The same product for up to 64 rows, neither `turned` nor `add`, k > 0: the sum over x and W is
// cut into `parts`. `partial` is (parts + 1, m, width) float32 that nobody else uses until the
// launch is done, of which the last is for the update, `width` is n rounded up to kDecodeCols.
// `arrived` is width / kDecodeCols zeros, put there by the shrink or the caller.
constexpr int64_t kDecodeCols = 64;
struct CudaDecode {
  CudaLinear linear;
  float* partial;
  int* arrived;
  int parts;
};

// The gradient of an adapter's matrix, with sums over the rows: gradient (r, cols) = scaling * u^T
// z, rounded once; u is (splits, m, r) float32, of which the parts are added, scaled and rounded to
// z's dtype, z (m, cols). For lora_a u is dy B, z is x; for lora_b, turned, u is h, z is dy. The
// sum is cut into `parts`; `partial` is (parts, r, cols) float32 of this launch's own, `arrived`
// zeros, one for each kGradientRows x 64 of the gradient.
constexpr int64_t kGradientRows = 64;  // 16 where r is no more
struct CudaGradient {
  const float* u;
  int64_t u_split;
  CudaMatrix z;
  const float* scaling;
  void* gradient;
  int64_t row, col;  // its strides, in elements
  int64_t m, r, cols;
  int splits, parts;
  float* partial;
  int* arrived;
};

}  // namespace lora_kernels

// `type` float16 or bfloat16, that of every operand but h. Null when the launch went through, else
// CUDA's words for what is wrong.
extern "C" {
const char* lk_cuda_shrink(const lora_kernels::CudaShrink* args, lora_kernels::DType type,
                           int device, void* stream);
// Rows of a tile: 128, 64 or 16, of 128, 64 and 64 columns; what there is no kernel for runs on 64.
const char* lk_cuda_linear(const lora_kernels::CudaLinear* args, lora_kernels::DType type,
                           int tile_rows, int device, void* stream);
const char* lk_cuda_decode(const lora_kernels::CudaDecode* args, lora_kernels::DType type,
                           int device, void* stream);
const char* lk_cuda_gradient(const lora_kernels::CudaGradient* args, lora_kernels::DType type,
                             int device, void* stream);
// Multiprocessors of a device.
int lk_cuda_multiprocessors(int device);
}
