// The gradients of an adapter, and their launcher: see gradient_sm80.h.
#include "gradient_sm80.h"
#include "on_device.h"

using namespace lora_kernels;

extern "C" const char* lk_cuda_gradient(const CudaGradient* args, DType type, int device,
                                        void* stream) {
  return on_device(device, [&] {
    const auto to = static_cast<cudaStream_t>(stream);
    type == DType::bf16 ? run_gradient<bf16>(*args, to) : run_gradient<f16>(*args, to);
  });
}
