// The words of CUDA C++ that the kernels use, for a host compiler: see simt.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "lora_kernels/scalar.h"
#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (lora_kernels_emulate::self().thread)
#define blockIdx (lora_kernels_emulate::block->index)
#define gridDim (lora_kernels_emulate::block->grid)
#define blockDim (lora_kernels_emulate::block->size)
#define __syncthreads() lora_kernels_emulate::sync_threads()

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using dim3 = lora_kernels_emulate::Dim3;

inline unsigned __float_as_uint(float x) { return lora_kernels::float_bits(x); }
inline float __uint_as_float(unsigned bits) { return lora_kernels::bits_float(bits); }
inline void __stwb(uint4* p, uint4 v) { *p = v; }
inline float __ldcg(const float* p) { return *p; }
inline void __threadfence() {}
// The compiler is told to contract nothing.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

inline unsigned __shfl_sync(unsigned, unsigned value, int lane) {
  return *lora_kernels_emulate::collective(&value, 1, [lane](lora_kernels_emulate::Warp& w) {
    for (int i = 0; i < 32; ++i) w.out[i][0] = w.in[lane][0];
  });
}
inline unsigned __shfl_xor_sync(unsigned, unsigned value, int with) {
  return *lora_kernels_emulate::collective(&value, 1, [with](lora_kernels_emulate::Warp& w) {
    for (int i = 0; i < 32; ++i) w.out[i][0] = w.in[i ^ with][0];
  });
}
inline unsigned __shfl_up_sync(unsigned, unsigned value, unsigned by) {
  return *lora_kernels_emulate::collective(&value, 1, [by](lora_kernels_emulate::Warp& w) {
    for (unsigned i = 0; i < 32; ++i) w.out[i][0] = w.in[i < by ? i : i - by][0];
  });
}
inline void __syncwarp() {
  lora_kernels_emulate::collective(nullptr, 0, [](lora_kernels_emulate::Warp&) {});
}
inline int atomicAdd(int* p, int by) {
  const int was = *p;
  *p += by;
  return was;
}
inline void atomicOr(unsigned* p, unsigned bits) { *p |= bits; }
inline unsigned long long atomicMin(unsigned long long* p, unsigned long long v) {
  const unsigned long long was = *p;
  if (v < was) *p = v;
  return was;
}

// The runtime: one device of 4 multiprocessors, whose memory is the host's.
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorLaunchFailure = 719,
                      cudaErrorStreamCaptureUnsupported = 900;
inline cudaError_t remembered = cudaSuccess;  // until cudaGetLastError
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int capability = lora_kernels_emulate::settings.capability;
  *value = attribute == cudaDevAttrMultiProcessorCount      ? 4
           : attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10
                                                            : capability % 10;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t) {
  std::memset(p, value, size);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  if (!lora_kernels_emulate::settings.capturing) return cudaSuccess;
  return remembered = cudaErrorStreamCaptureUnsupported;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t last = remembered;
  remembered = cudaSuccess;
  return lora_kernels_emulate::fault.empty() ? last : cudaErrorLaunchFailure;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorStreamCaptureUnsupported ? "the stream is capturing"
                                                    : lora_kernels_emulate::fault.c_str();
}
