// Launcher of the CUDA merge: raw pointers, sizes and a stream; no framework headers.
#pragma once

#include <cstdint>

#include "lora_kernels/cpu.h"  // DType

namespace lora_kernels {

// weight (n, k) += sign * scaling * b (n, r) @ a (r, k), in place. Strides count elements; the
// columns of `weight` are adjacent. `scaling` is one float in device memory: reading it here would
// stop the host.
struct CudaMergeArgs {
  void* weight;
  const void* a;
  const void* b;
  const float* scaling;
  int64_t n, k, r;
  int64_t weight_row;
  int64_t a_row, a_col;
  int64_t b_row, b_col;
  DType weight_type, a_type, b_type;
  float sign;
};

}  // namespace lora_kernels

// Null when the launch went through, else CUDA's words for what is wrong.
extern "C" const char* lk_cuda_merge(const lora_kernels::CudaMergeArgs* args, int device,
                                     void* stream);
