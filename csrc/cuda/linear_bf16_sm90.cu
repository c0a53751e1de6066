// The linear kernels of sm_90a for bfloat16: see linear_sm90.h.
#include "linear_sm90.h"

namespace lora_kernels {
const char* linear_bf16_sm90(const CudaLinear& args, int cols, int device, void* stream) {
  return run_sm90<bf16>(args, cols, device, stream);
}
}  // namespace lora_kernels
