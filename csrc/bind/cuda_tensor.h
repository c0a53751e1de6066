// What the CUDA bindings share, on LibTorch's stable ABI: dtypes, devices, and the current stream.
// With LK_EMULATE they take CPU tensors and register their kernels for those: the tests' build.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "lora_kernels/cpu.h"

#if defined(LK_EMULATE)
#define LK_CUDA_KEY CPU
#else
#define LK_CUDA_KEY CUDA
// Declared here because torch's headers show it only to builds that have the CUDA toolkit's headers
// at hand.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace lora_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
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

inline void check_device(const Tensor& tensor, const char* name, const Tensor& first) {
#if defined(LK_EMULATE)
  STD_TORCH_CHECK(tensor.is_cpu() && first.is_cpu(), name, ": expected a CPU tensor");
#else
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == first.get_device_index(), name,
                  ": expected the device of the first tensor");
#endif
}

// A matrix of this size on the device of `first`.
inline void check_matrix(const Tensor& tensor, const char* name, const Tensor& first, int64_t rows,
                         int64_t cols) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected 2 dimensions, got ", tensor.dim());
  check_device(tensor, name, first);
  STD_TORCH_CHECK(tensor.size(0) == rows && tensor.size(1) == cols, name, ": expected (", rows,
                  ", ", cols, "), got (", tensor.size(0), ", ", tensor.size(1), ")");
}

inline const float* scaling_of(const Tensor& scaling, const char* name, const Tensor& first) {
  check_device(scaling, name, first);
  STD_TORCH_CHECK(scaling.numel() == 1 && scaling.scalar_type() == ScalarType::Float, name,
                  ": expected one float32");
  return static_cast<const float*>(scaling.const_data_ptr());
}

inline int device_of(const Tensor& tensor) {
#if defined(LK_EMULATE)
  (void)tensor;
  return 0;
#else
  return tensor.get_device_index();
#endif
}

// launch(device, stream) on the tensor's device and its current stream; what it returns is null or
// CUDA's words for what is wrong.
template <class Launch>
void on_stream(const char* op, const Tensor& tensor, const Launch& launch) {
  const int device = device_of(tensor);
#if defined(LK_EMULATE)
  void* const stream = nullptr;
#else
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
#endif
  const char* error = launch(device, stream);
  STD_TORCH_CHECK(error == nullptr, op, " on CUDA device ", device, ": ", error ? error : "");
}

}  // namespace lora_kernels
