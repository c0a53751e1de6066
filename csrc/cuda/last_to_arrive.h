// Parts of a tile's sum that several blocks leave in device memory: the last of them adds up all.
#pragma once

#include "device.h"

namespace lora_kernels {

// Whether this block is the last of `parts` at `arrived`, which began at 0; it then sees what the
// others wrote before they came here. For all threads of the block together. What is added after it
// is added in an order of its own, whichever block is last.
__device__ inline bool last_to_arrive(int* arrived, int parts) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1) == parts - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// The sum of `parts` floats in ascending order, `stride` apart; past L1, which knows no other
// multiprocessor's writes.
__device__ inline float sum_parts(const float* from, int parts, int64_t stride) {
  float sum = __ldcg(from);
#pragma unroll 4
  for (int p = 1; p < parts; ++p) sum += __ldcg(from + p * stride);
  return sum;
}

}  // namespace lora_kernels
