// Elements of an adapter, of any dtype, as float32. The branch on the dtype is the same for a whole
// grid.
#pragma once

#include "device.h"

namespace lora_kernels {

__device__ inline float load_adapter(const void* p, DType type, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(p)[i];
  if (type == DType::f16) return device::to_float(static_cast<const f16*>(p)[i]);
  return device::to_float(static_cast<const bf16*>(p)[i]);
}

template <class T>
__device__ void load_strip(const T* p, float (&out)[8]) {
  uint4 vectors[8 * sizeof(T) / 16];
  T values[8];
#pragma unroll
  for (unsigned j = 0; j < sizeof(vectors) / 16; ++j) {
    vectors[j] = reinterpret_cast<const uint4*>(p)[j];
  }
  memcpy(values, vectors, sizeof(values));
#pragma unroll
  for (int j = 0; j < 8; ++j) out[j] = device::to_float(values[j]);
}

// Eight elements from `i` on, `stride` apart, of which the first `live` exist; the others are zero.
// 16-byte loads where that is possible.
__device__ inline void load_adapter_strip(const void* p, DType type, int64_t i, int64_t stride,
                                          int live, float (&out)[8]) {
  const int64_t size = type == DType::f32 ? 4 : 2;
  if (stride == 1 && live == 8 && (reinterpret_cast<uintptr_t>(p) + i * size) % 16 == 0) {
    if (type == DType::f32) {
      load_strip(static_cast<const float*>(p) + i, out);
    } else if (type == DType::f16) {
      load_strip(static_cast<const f16*>(p) + i, out);
    } else {
      load_strip(static_cast<const bf16*>(p) + i, out);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    out[j] = j < live ? load_adapter(p, type, i + j * stride) : 0.f;
  }
}

}  // namespace lora_kernels
