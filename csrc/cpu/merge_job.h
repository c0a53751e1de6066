// Shared by the files of the merge family: the arguments of one merge, and a buffer per thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lora_kernels/merge.h"

namespace lora_kernels {

// Neighbouring columns of w are neighbours in memory where w has a unit stride at all.
struct MergeJob {
  Matrix w;
  LowRank terms[kMaxTerms];
  int num_terms;
  bool transposed;  // w, a and b hold the caller's W^T, B^T and A^T
};

// At least `bytes`, 64-byte aligned, kept by the calling thread for its next call.
void* merge_scratch(size_t bytes);

}  // namespace lora_kernels
