// The linear kernels for bfloat16: see linear_sm80.h.
#include "linear_dtype.h"

namespace lora_kernels {
void shrink_bf16(const CudaShrink& args, void* stream) {
  run_shrink<bf16>(args, static_cast<cudaStream_t>(stream));
}
void linear_bf16(const CudaLinear& args, int rows, void* stream) {
  run_linear<bf16>(args, rows, static_cast<cudaStream_t>(stream));
}
}  // namespace lora_kernels
