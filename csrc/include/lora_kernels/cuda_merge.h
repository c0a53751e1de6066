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
  int64_t a_row, a_col;
  int64_t b_row, b_col;
  int32_t r;
  DType a_type, b_type;
  float sign;
};

// weight (n, k), its columns adjacent, and the updates of it: one (merge), or two (switch).
template <int kTerms>
struct CudaMerge {
  void* weight;
  int64_t n, k;
  int64_t weight_row;
  CudaTerm terms[kTerms];
};

// Weights of one launch: what fits into the 4 KiB of kernel arguments of every driver.
constexpr int kMergeListSize = 35;

}  // namespace lora_kernels

// All give null when the launch went through, else CUDA's words for what is wrong. Pointers and
// sizes, not values, are what a CUDA graph captures.
extern "C" {
// Weights of one dtype, each += its update, in place: a launch for every kMergeListSize of them. No
// two may overlap.
const char* lk_cuda_merge(const lora_kernels::CudaMerge<1>* list, int64_t count,
                          lora_kernels::DType weight_type, int device, void* stream);
// weight += both updates, rounded once.
const char* lk_cuda_switch(const lora_kernels::CudaMerge<2>* merge, lora_kernels::DType weight_type,
                           int device, void* stream);
// *finite, in device memory, becomes whether lk_cuda_merge would leave only finite elements. Writes
// no more.
const char* lk_cuda_merge_is_finite(const lora_kernels::CudaMerge<1>* list, int64_t count,
                                    lora_kernels::DType weight_type, bool* finite, int device,
                                    void* stream);
}
