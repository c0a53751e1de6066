// Launchers of the CUDA merge family: raw pointers, sizes and a stream; no framework headers.
#pragma once

#include <cstdint>

#include "lora_kernels/cpu.h"  // DType

namespace lora_kernels {

// One update sign * scaling * b (n, r) @ a (r, k). Strides count elements. `scaling` is one float
// in device memory: reading it here would stop the host.
struct CudaTerm {
  const void* a;
  const void* b;
  const float* scaling;
  int64_t r;
  int64_t a_row, a_col;
  int64_t b_row, b_col;
  DType a_type, b_type;
  float sign;
};

constexpr int kMaxCudaTerms = 2;

// weight (n, k), its columns adjacent, and the updates of it.
struct CudaMergeArgs {
  void* weight;
  int64_t n, k;
  int64_t weight_row;
  DType weight_type;
  int num_terms;
  CudaTerm terms[kMaxCudaTerms];
};

}  // namespace lora_kernels

// Both give null when the launch went through, else CUDA's words for what is wrong.
extern "C" {
// weight += every term, in place.
const char* lk_cuda_merge(const lora_kernels::CudaMergeArgs* args, int device, void* stream);
// *finite, in device memory, becomes whether that would leave only finite elements. Writes no more.
const char* lk_cuda_merge_is_finite(const lora_kernels::CudaMergeArgs* args, bool* finite,
                                    int device, void* stream);
}
