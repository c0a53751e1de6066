// merge_ for CUDA tensors on LibTorch's stable ABI: checks, pointers, the current stream, one
// launch. Registered under the namespace lora_kernels_cuda: ops/cuda_choice.py picks between it and
// Triton.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "lora_kernels/cuda_merge.h"

// Declared here because torch's headers show it only to builds that have the CUDA toolkit's headers
// at hand.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using lora_kernels::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16");
      return DType::f32;
  }
}

void check_adapter(const Tensor& tensor, const char* name, DType type, const Tensor& weight,
                   DType weight_type) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected 2 dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == weight.get_device_index(), name,
                  ": expected the device of weight");
  STD_TORCH_CHECK(type == weight_type || type == DType::f32, name,
                  ": expected the dtype of weight or float32");
}

void merge_(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling, double sign) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected 2 dimensions, got ", weight.dim());
  STD_TORCH_CHECK(weight.size(1) <= 1 || weight.stride(1) == 1,
                  "weight: expected adjacent columns, got a column stride of ", weight.stride(1));
  const DType type = dtype_of(weight, "weight");
  const DType a_type = dtype_of(lora_a, "lora_a"), b_type = dtype_of(lora_b, "lora_b");
  check_adapter(lora_a, "lora_a", a_type, weight, type);
  check_adapter(lora_b, "lora_b", b_type, weight, type);
  const int64_t n = weight.size(0), k = weight.size(1), r = lora_a.size(0);
  STD_TORCH_CHECK(lora_a.size(1) == k, "lora_a: expected (rank, ", k, "), got (", r, ", ",
                  lora_a.size(1), ")");
  STD_TORCH_CHECK(lora_b.size(0) == n && lora_b.size(1) == r, "lora_b: expected (", n, ", ", r,
                  "), got (", lora_b.size(0), ", ", lora_b.size(1), ")");
  STD_TORCH_CHECK(scaling.numel() == 1 && scaling.scalar_type() == ScalarType::Float &&
                      scaling.is_cuda() && scaling.get_device_index() == weight.get_device_index(),
                  "scaling: expected one float32 on the device of weight");

  const lora_kernels::CudaMergeArgs args{weight.mutable_data_ptr(),
                                         lora_a.const_data_ptr(),
                                         lora_b.const_data_ptr(),
                                         static_cast<const float*>(scaling.const_data_ptr()),
                                         n,
                                         k,
                                         r,
                                         weight.stride(0),
                                         lora_a.stride(0),
                                         lora_a.stride(1),
                                         lora_b.stride(0),
                                         lora_b.stride(1),
                                         type,
                                         a_type,
                                         b_type,
                                         static_cast<float>(sign)};
  const int32_t device = weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = lk_cuda_merge(&args, device, stream);
  STD_TORCH_CHECK(error == nullptr, "merge_ on CUDA device ", device, ": ", error ? error : "");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_cuda, CUDA, m) { m.impl("merge_", TORCH_BOX(&merge_)); }
