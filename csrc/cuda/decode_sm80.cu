// The linear layer for few rows, and its launcher: see decode_sm80.h.
#include "decode_sm80.h"
#include "on_device.h"

using namespace lora_kernels;

extern "C" const char* lk_cuda_decode(const CudaDecode* args, DType type, int device,
                                      void* stream) {
  return on_device(device, [&] {
    const auto to = static_cast<cudaStream_t>(stream);
    const bool multi = args->linear.plan.row_order != nullptr;
    if (type == DType::bf16) {
      return multi ? run_decode<bf16, true>(*args, to) : run_decode<bf16, false>(*args, to);
    }
    multi ? run_decode<f16, true>(*args, to) : run_decode<f16, false>(*args, to);
  });
}
