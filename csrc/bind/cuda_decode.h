// Few rows: the choice of the kernel that is made for them, and its workspace.
#pragma once

#include "cuda_tensor.h"
#include "lora_kernels/cuda_linear.h"
#include "lora_kernels/cuda_tile.h"

namespace lora_kernels {

inline int multiprocessors(const Tensor& x) { return lk_cuda_multiprocessors(device_of(x)); }

// h and the product, where the call is one for the kernel for few rows; else false, and nothing was
// done. The workspace is of this call alone, so calls on several streams share nothing; the shrink
// clears its counters, so a captured graph does when it is replayed.
inline bool run_decode(const char* op, CudaShrink shrink, const CudaLinear& linear, const Tensor& x,
                       DType type, bool invariant) {
  if (linear.add || linear.turned) return false;
  const int parts = cuda_decode_parts(linear.m, linear.n, linear.k, multiprocessors(x), invariant);
  if (parts == 0) return false;
  const int64_t tiles = (linear.n + kDecodeCols - 1) / kDecodeCols;
  const int64_t sums = (parts + 1) * linear.m * tiles * kDecodeCols;
  Tensor room = torch::stable::new_empty(x, {sums + tiles}, ScalarType::Float);
  CudaDecode decode = {linear, static_cast<float*>(room.mutable_data_ptr()), nullptr, parts};
  decode.arrived = reinterpret_cast<int*>(decode.partial + sums);
  shrink.cleared = decode.arrived;
  shrink.num_cleared = static_cast<int>(tiles);
  // With no rank there is no h to compute, and nobody to clear.
  if (linear.r == 0) torch::stable::zero_(room);
  on_stream(op, x, [&](int device, void* stream) {
    const char* error = lk_cuda_shrink(&shrink, type, device, stream);
    return error != nullptr ? error : lk_cuda_decode(&decode, type, device, stream);
  });
  return true;
}

}  // namespace lora_kernels
