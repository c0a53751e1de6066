// Launchers of the exact merge on CUDA. The size of a residual depends on the data, so the host
// waits for it between measuring and writing: not for graph capture.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lora_kernels/cuda_merge.h"

namespace lora_kernels {

// weight (n, k), any strides; `term` with sign +1. `workspace` of lk_cuda_exact_workspace(n, k)
// bytes at a multiple of 8, `body` the residual's, both in device memory.
struct CudaExact {
  void* weight;
  int64_t n, k;
  int64_t weight_row, weight_col;
  DType weight_type;
  CudaTerm term;
  void* workspace;
  uint8_t* body;
  int64_t body_size;
};

}  // namespace lora_kernels

// All but the first give null when the launches went through, else CUDA's words for what is wrong.
extern "C" {
int64_t lk_cuda_exact_workspace(int64_t n, int64_t k);
// The bytes a merge would record, on the host, 0 where it is refused. Writes nothing but the
// workspace, and waits for it.
const char* lk_cuda_exact_measure(const lora_kernels::CudaExact* merge, int64_t* body_size,
                                  int device, void* stream);
// Merges what was measured. With a null body nothing is recorded.
const char* lk_cuda_exact_write(const lora_kernels::CudaExact* merge, int device, void* stream);
// Undoes a merge with its body: every block is checked before the first is written.
const char* lk_cuda_exact_undo(const lora_kernels::CudaExact* merge, int device, void* stream);
// status[2], in device memory: what became of the last of the above (an ExactStatus and a block);
// *ok, on the host and where asked for, whether it went well.
const char* lk_cuda_exact_status(const lora_kernels::CudaExact* merge, int64_t* status, bool* ok,
                                 int device, void* stream);
}
