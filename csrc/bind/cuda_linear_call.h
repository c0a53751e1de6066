// What calls of the fused linear layer on CUDA share: checks of their tensors, the arguments of the
// kernels, and the launches.
#pragma once

#include <optional>
#include <vector>

#include "cuda_decode.h"
#include "cuda_tensor.h"
#include "lora_kernels/cuda_linear.h"
#include "lora_kernels/cuda_sm90.h"
#include "lora_kernels/cuda_tile.h"

namespace lora_kernels {

using MaybeTensor = std::optional<Tensor>;
using Splits = std::optional<std::vector<int64_t>>;

inline CudaMatrix matrix(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }
inline DType half_type(const Tensor& x, const char* name) {
  const DType type = dtype_of(x, name);
  STD_TORCH_CHECK(type != DType::f32, name, ": expected float16 or bfloat16");
  STD_TORCH_CHECK(x.dim() == 2, name, ": expected 2 dimensions, got ", x.dim());
  return type;
}

inline void check_operand(const Tensor& t, const char* name, const Tensor& x, int64_t rows,
                          int64_t cols) {
  check_matrix(t, name, x, rows, cols);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
}

inline void no_splits(const Splits& splits) {
  STD_TORCH_CHECK(!splits.has_value(), "out_splits: expected None");
}

inline CudaTile choose(const Tensor& x, int64_t n, int64_t k, int64_t r, bool invariant) {
  return cuda_tile(x.size(0), n, k, r, multiprocessors(x), invariant);
}

inline void run(const char* op, const CudaShrink& shrink, const Tensor& x, DType type) {
  on_stream(op, x, [&](int device, void* stream) {
    return lk_cuda_shrink(&shrink, type, device, stream);
  });
}
// Columns of the sm_90a kernel's tile where that is the choice; else 0.
inline int sm90_cols(const CudaLinear& linear, const Tensor& x, bool invariant) {
  if (invariant || !lk_cuda_is_sm90(device_of(x)) || !fits_sm90(linear)) return 0;
  return cuda_sm90_cols(linear.m, linear.n, linear.k, linear.r, multiprocessors(x));
}

// `cols` as from sm90_cols.
inline void run(const char* op, const CudaLinear& linear, const Tensor& x, DType type,
                const CudaTile& tile, int cols) {
  on_stream(op, x, [&](int device, void* stream) {
    if (cols > 0) return lk_cuda_linear_sm90(&linear, type, cols, device, stream);
    return lk_cuda_linear(&linear, type, tile.rows, device, stream);
  });
}

// h, then the product with it.
inline void run(const char* op, CudaShrink shrink, CudaLinear linear, const Tensor& x, DType type,
                const CudaTile& tile, bool invariant) {
  if (run_decode(op, shrink, linear, x, type, invariant)) return;
  const int cols = sm90_cols(linear, x, invariant);
  Tensor row_slots;
  if (cols > 0 && linear.plan.row_order != nullptr) {
    row_slots = torch::stable::new_empty(x, {linear.m}, ScalarType::Int);
    linear.plan.row_slots = static_cast<int32_t*>(row_slots.mutable_data_ptr());
    shrink.plan.row_slots = linear.plan.row_slots;
  }
  run(op, shrink, x, type);
  run(op, linear, x, type, tile, cols);
}

inline void set_bias(CudaLinear& linear, const MaybeTensor& bias, const Tensor& x) {
  if (!bias.has_value()) return;
  check_device(*bias, "bias", x);
  STD_TORCH_CHECK(
      bias->dim() == 1 && bias->size(0) == linear.n && bias->scalar_type() == x.scalar_type(),
      "bias: expected ", linear.n, " elements of the dtype of x");
  linear.bias = bias->const_data_ptr();
  linear.bias_stride = bias->stride(0);
}

inline void set_out(CudaLinear& linear, Tensor& y, const char* name, const Tensor& x) {
  check_operand(y, name, x, linear.m, linear.n);
  linear.y = y.mutable_data_ptr();
  linear.y_row = y.stride(0);
  linear.y_col = y.stride(1);
}

inline void set_h(CudaLinear& linear, const Tensor& h, int splits) {
  linear.h = static_cast<const float*>(h.const_data_ptr());
  linear.h_row = linear.r;
  linear.h_split = linear.m * linear.r;
  linear.splits = splits;
}

inline Tensor new_h(const Tensor& x, int64_t r, int splits) {
  return torch::stable::new_empty(x, {splits, x.size(0), r}, ScalarType::Float);
}

// h = x aᵀ, in `splits` parts of the columns.
inline CudaShrink shrink_of(const Tensor& x, const CudaMatrix& a, int64_t r, Tensor& h,
                            int splits) {
  CudaShrink shrink = {};
  shrink.x = matrix(x);
  shrink.a = a;
  shrink.h = static_cast<float*>(h.mutable_data_ptr());
  shrink.m = x.size(0);
  shrink.k = x.size(1);
  shrink.r = r;
  shrink.splits = splits;
  return shrink;
}

}  // namespace lora_kernels
