// merge_, merge_list_, switch_ and their finite checks for CUDA tensors on LibTorch's stable ABI:
// checks, pointers, the current stream, one launch. Registered under the namespace
// lora_kernels_cuda: ops/cuda_choice.py picks between it and Triton.
#include <array>
#include <vector>

#include "cuda_term.h"

namespace lora_kernels {
namespace {

using Tensors = std::vector<Tensor>;

CudaMerge<1> one(const Tensor& weight, const Tensor& a, const Tensor& b, const Tensor& scaling,
                 double sign) {
  // The kernel only reads the weight where it checks.
  return {const_cast<void*>(weight.const_data_ptr()),
          weight.size(0),
          weight.size(1),
          weight.stride(0),
          {cuda_term(weight, kOnlyTerm, a, b, scaling, sign)}};
}

void merge_(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling, double sign) {
  const DType type = weight_type(weight);
  CudaMerge<1> merge = one(weight, lora_a, lora_b, scaling, sign);
  merge.weight = weight.mutable_data_ptr();
  on_stream("merge_", weight, [&](int device, void* stream) {
    return lk_cuda_merge(&merge, 1, type, device, stream);
  });
}

void switch_(Tensor weight, Tensor old_a, Tensor old_b, Tensor old_scaling, Tensor new_a,
             Tensor new_b, Tensor new_scaling) {
  const DType type = weight_type(weight);
  const CudaMerge<2> merge = {weight.mutable_data_ptr(),
                              weight.size(0),
                              weight.size(1),
                              weight.stride(0),
                              {cuda_term(weight, kOldTerm, old_a, old_b, old_scaling, -1.0),
                               cuda_term(weight, kNewTerm, new_a, new_b, new_scaling, 1.0)}};
  on_stream("switch_", weight,
            [&](int device, void* stream) { return lk_cuda_switch(&merge, type, device, stream); });
}

Tensor merge_is_finite(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling, double sign) {
  const DType type = weight_type(weight);
  const CudaMerge<1> merge = one(weight, lora_a, lora_b, scaling, sign);
  Tensor finite = torch::stable::new_empty(weight, {}, ScalarType::Bool);
  bool* flag = static_cast<bool*>(finite.mutable_data_ptr());
  on_stream("merge_is_finite", weight, [&](int device, void* stream) {
    return lk_cuda_merge_is_finite(&merge, 1, type, flag, device, stream);
  });
  return finite;
}

// Everything is checked before the first weight is written; one launch or a few for each dtype.
void merge_list_(Tensors weights, Tensors lora_a, Tensors lora_b, Tensors scalings, double sign) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(lora_a.size() == count && lora_b.size() == count && scalings.size() == count,
                  "merge_list_: expected as many lora_a, lora_b and scalings as weights (", count,
                  "), got ", lora_a.size(), ", ", lora_b.size(), " and ", scalings.size());
  std::array<std::vector<CudaMerge<1>>, 3> by_type;
  for (size_t i = 0; i < count; ++i) {
    check_device(weights[i], "weights", weights[0]);
    const DType type = weight_type(weights[i]);
    by_type[static_cast<size_t>(type)].push_back(
        one(weights[i], lora_a[i], lora_b[i], scalings[i], sign));
    by_type[static_cast<size_t>(type)].back().weight = weights[i].mutable_data_ptr();
  }
  for (size_t type = 0; type < by_type.size(); ++type) {
    const std::vector<CudaMerge<1>>& list = by_type[type];
    if (list.empty()) continue;
    on_stream("merge_list_", weights[0], [&](int device, void* stream) {
      return lk_cuda_merge(list.data(), static_cast<int64_t>(list.size()), static_cast<DType>(type),
                           device, stream);
    });
  }
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_cuda, LK_CUDA_KEY, m) {
  m.impl("merge_", TORCH_BOX(&lora_kernels::merge_));
  m.impl("merge_list_", TORCH_BOX(&lora_kernels::merge_list_));
  m.impl("switch_", TORCH_BOX(&lora_kernels::switch_));
  m.impl("merge_is_finite", TORCH_BOX(&lora_kernels::merge_is_finite));
}
