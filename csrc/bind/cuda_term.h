// A weight and its low-rank updates as the CUDA merge ops take them.
#pragma once

#include "cuda_tensor.h"
#include "lora_kernels/cuda_merge.h"

namespace lora_kernels {

struct TermNames {
  const char *a, *b, *scaling;
};
inline constexpr TermNames kOnlyTerm = {"lora_a", "lora_b", "scaling"};
inline constexpr TermNames kOldTerm = {"old_a", "old_b", "old_scaling"};
inline constexpr TermNames kNewTerm = {"new_a", "new_b", "new_scaling"};

inline DType weight_type(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected 2 dimensions, got ", weight.dim());
  STD_TORCH_CHECK(weight.size(1) <= 1 || weight.stride(1) == 1,
                  "weight: expected adjacent columns, got a column stride of ", weight.stride(1));
  return dtype_of(weight, "weight");
}

inline CudaTerm cuda_term(const Tensor& weight, const TermNames& names, const Tensor& a,
                          const Tensor& b, const Tensor& scaling, double sign) {
  const DType type = dtype_of(weight, "weight");
  const DType a_type = dtype_of(a, names.a), b_type = dtype_of(b, names.b);
  STD_TORCH_CHECK(a.dim() == 2, names.a, ": expected 2 dimensions, got ", a.dim());
  const int64_t r = a.size(0);
  STD_TORCH_CHECK(r <= 0x7fffffff, names.a, ": expected a rank below 2**31, got ", r);
  check_matrix(a, names.a, weight, r, weight.size(1));
  check_matrix(b, names.b, weight, weight.size(0), r);
  STD_TORCH_CHECK(a_type == type || a_type == DType::f32, names.a,
                  ": expected the dtype of weight or float32");
  STD_TORCH_CHECK(b_type == type || b_type == DType::f32, names.b,
                  ": expected the dtype of weight or float32");
  return {a.const_data_ptr(),
          b.const_data_ptr(),
          scaling_of(scaling, names.scaling, weight),
          a.stride(0),
          a.stride(1),
          b.stride(0),
          b.stride(1),
          static_cast<int32_t>(r),
          a_type,
          b_type,
          static_cast<float>(sign)};
}

}  // namespace lora_kernels
