// merge_, switch_ and merge_is_finite for CUDA tensors on LibTorch's stable ABI: checks, pointers,
// the current stream, one launch. Registered under the namespace lora_kernels_cuda:
// ops/cuda_choice.py picks between it and Triton.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "lora_kernels/cuda_merge.h"

// Declared here because torch's headers show it only to builds that have the CUDA toolkit's headers
// at hand.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using lora_kernels::CudaMergeArgs;
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
                   DType weight_type, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected 2 dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == weight.get_device_index(), name,
                  ": expected the device of weight");
  STD_TORCH_CHECK(type == weight_type || type == DType::f32, name,
                  ": expected the dtype of weight or float32");
  STD_TORCH_CHECK(tensor.size(0) == rows && tensor.size(1) == cols, name, ": expected (", rows,
                  ", ", cols, "), got (", tensor.size(0), ", ", tensor.size(1), ")");
}

struct Names {
  const char *a, *b, *scaling;
};
constexpr Names kOnly = {"lora_a", "lora_b", "scaling"};
constexpr Names kOld = {"old_a", "old_b", "old_scaling"};
constexpr Names kNew = {"new_a", "new_b", "new_scaling"};

CudaMergeArgs arguments(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected 2 dimensions, got ", weight.dim());
  STD_TORCH_CHECK(weight.size(1) <= 1 || weight.stride(1) == 1,
                  "weight: expected adjacent columns, got a column stride of ", weight.stride(1));
  return {nullptr, weight.size(0), weight.size(1), weight.stride(0), dtype_of(weight, "weight"), 0,
          {}};
}

void add_term(CudaMergeArgs& args, const Tensor& weight, const Names& names, const Tensor& a,
              const Tensor& b, const Tensor& scaling, double sign) {
  const DType a_type = dtype_of(a, names.a), b_type = dtype_of(b, names.b);
  STD_TORCH_CHECK(a.dim() == 2, names.a, ": expected 2 dimensions, got ", a.dim());
  const int64_t r = a.size(0);
  check_adapter(a, names.a, a_type, weight, args.weight_type, r, args.k);
  check_adapter(b, names.b, b_type, weight, args.weight_type, args.n, r);
  STD_TORCH_CHECK(scaling.numel() == 1 && scaling.scalar_type() == ScalarType::Float &&
                      scaling.is_cuda() && scaling.get_device_index() == weight.get_device_index(),
                  names.scaling, ": expected one float32 on the device of weight");
  args.terms[args.num_terms++] = {a.const_data_ptr(),
                                  b.const_data_ptr(),
                                  static_cast<const float*>(scaling.const_data_ptr()),
                                  r,
                                  a.stride(0),
                                  a.stride(1),
                                  b.stride(0),
                                  b.stride(1),
                                  a_type,
                                  b_type,
                                  static_cast<float>(sign)};
}

// launch(device, stream) on the weight's device and its current stream.
template <class Launch>
void on_stream(const char* op, const Tensor& weight, Launch launch) {
  const int32_t device = weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = launch(device, stream);
  STD_TORCH_CHECK(error == nullptr, op, " on CUDA device ", device, ": ", error ? error : "");
}

void write(const char* op, Tensor& weight, CudaMergeArgs& args) {
  args.weight = weight.mutable_data_ptr();
  on_stream(op, weight,
            [&](int device, void* stream) { return lk_cuda_merge(&args, device, stream); });
}

void merge_(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling, double sign) {
  CudaMergeArgs args = arguments(weight);
  add_term(args, weight, kOnly, lora_a, lora_b, scaling, sign);
  write("merge_", weight, args);
}

void switch_(Tensor weight, Tensor old_a, Tensor old_b, Tensor old_scaling, Tensor new_a,
             Tensor new_b, Tensor new_scaling) {
  CudaMergeArgs args = arguments(weight);
  add_term(args, weight, kOld, old_a, old_b, old_scaling, -1.0);
  add_term(args, weight, kNew, new_a, new_b, new_scaling, 1.0);
  write("switch_", weight, args);
}

Tensor merge_is_finite(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling, double sign) {
  CudaMergeArgs args = arguments(weight);
  add_term(args, weight, kOnly, lora_a, lora_b, scaling, sign);
  args.weight = const_cast<void*>(weight.const_data_ptr());  // the kernel only reads it
  Tensor finite = torch::stable::new_empty(weight, {}, ScalarType::Bool);
  bool* flag = static_cast<bool*>(finite.mutable_data_ptr());
  on_stream("merge_is_finite", weight, [&](int device, void* stream) {
    return lk_cuda_merge_is_finite(&args, flag, device, stream);
  });
  return finite;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_cuda, CUDA, m) {
  m.impl("merge_", TORCH_BOX(&merge_));
  m.impl("switch_", TORCH_BOX(&switch_));
  m.impl("merge_is_finite", TORCH_BOX(&merge_is_finite));
}
