// The linear kernels are compiled a dtype a file, side by side.
#pragma once

#include "linear_sm80.h"

namespace lora_kernels {
void shrink_bf16(const CudaShrink& args, void* stream);
void linear_bf16(const CudaLinear& args, int rows, void* stream);
}  // namespace lora_kernels
