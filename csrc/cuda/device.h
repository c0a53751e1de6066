// What the kernels are written in: CUDA C++, and the instructions that it has no word for. With
// LK_EMULATE the same names run on the host (csrc/emulate), where the kernels are tested.
#pragma once

#include <cstdint>

#include "lora_kernels/cpu.h"  // f16, bf16, DType

#if defined(LK_EMULATE)

#include "../emulate/cuda_words.h"
#include "../emulate/instructions.h"

#else

#include <cuda_runtime.h>

// LK_LAUNCH(kernel, grid, threads, bytes of dynamic shared memory, stream, arguments...)
#define LK_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  (kernel)<<<grid, threads, shared, stream>>>(__VA_ARGS__)

namespace lora_kernels {
namespace device {

__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  return shared_bytes;
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) {
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}
__device__ __forceinline__ float to_float(f16 v) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(v.bits));
  return x;
}

// To nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  bf16 x;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(x.bits) : "f"(v));
  return x;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float v) {
  f16 x;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x.bits) : "f"(v));
  return x;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes of shared memory; of the source only the first `bytes` are read, the others are zero.
__device__ __forceinline__ void async_copy_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
// The same for what this grid reads once: the first to leave L2, fetched in whole lines.
__device__ __forceinline__ void async_stream_16(void* to, const void* from, int bytes) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until all but the newest kLeft groups of this thread have landed.
template <int kLeft>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
// Element i of eight 16-bit ones.
__device__ __forceinline__ void write_2(void* to, int i, uint16_t v) {
  static_cast<uint16_t*>(to)[i] = v;
}

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8. A lane gets, of
// each, elements 2 (l % 4) and the next of row l / 4; with kTurned of column l / 4.
template <bool kTurned>
__device__ __forceinline__ void load_matrices(uint32_t (&v)[4], const void* row) {
  if constexpr (kTurned) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// c (16, 8) += a (16, 16) b (16, 8): fragments as in mma_maps.h.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1);
#define LK_MULTIPLY(T, name)                                                                      \
  template <>                                                                                     \
  __device__ __forceinline__ void multiply<T>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, \
                                              uint32_t b1) {                                      \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                           \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                 \
  }
LK_MULTIPLY(bf16, "bf16")
LK_MULTIPLY(f16, "f16")
#undef LK_MULTIPLY

}  // namespace device
}  // namespace lora_kernels

#endif
