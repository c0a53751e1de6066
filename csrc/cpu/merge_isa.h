// For the files of the merge family that are compiled once per instruction set.
#pragma once

#include "lora_kernels/simd.h"
#include "merge_job.h"

namespace lora_kernels {
namespace LK_ISA {

void merge_jobs(const MergeJob* jobs, size_t count);
bool merge_finite_job(const MergeJob& job);

LK_INLINE float element(const Matrix& m, int64_t i, int64_t j) {
  const int64_t at = i * m.row_stride + j * m.col_stride;
  if (m.dtype == DType::f32) return static_cast<const float*>(m.data)[at];
  if (m.dtype == DType::bf16) return to_float(static_cast<const bf16*>(m.data)[at]);
  return to_float(static_cast<const f16*>(m.data)[at]);
}

}  // namespace LK_ISA
}  // namespace lora_kernels
