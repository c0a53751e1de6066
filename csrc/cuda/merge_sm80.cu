// In-place merge on CUDA cores, for every GPU from sm_80 up: W (n, k) += sign * s * B (n, r) A (r,
// k).
//
// Memory-bound at LoRA ranks, so the point is one pass over W with full-width accesses. A block
// owns a tile of 64 rows by 128 columns, a thread 4 rows by 8 columns. Each thread first asks for
// its part of W, then sums over the rank while that is under way: chunks of A and B go through
// shared memory as float32, so their dtypes and strides matter only there. Sums are float32 in
// ascending rank, and W is rounded once.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "lora_kernels/cuda_merge.h"

namespace {

using lora_kernels::CudaMergeArgs;
using lora_kernels::DType;

constexpr int kRows = 64, kCols = 128, kRank = 16;  // tile of W, chunk of the rank
constexpr int kThreadRows = 4, kThreadCols = 8;     // of one thread
constexpr int kThreadsX = kCols / kThreadCols;      // neighbours along a row of W
constexpr int kThreads = kThreadsX * kRows / kThreadRows;

__device__ float to_float(float v) { return v; }
__device__ float to_float(__half v) { return __half2float(v); }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ void store(float* p, float v) { *p = v; }
__device__ void store(__half* p, float v) { *p = __float2half_rn(v); }
__device__ void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }

// Element `i` of an adapter; the branch is the same for the whole grid.
__device__ float load_adapter(const void* p, DType type, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(p)[i];
  if (type == DType::f16) return to_float(static_cast<const __half*>(p)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
}

// The thread's eight columns of one row: 16-byte accesses where the row allows, else one by one up
// to `live`.
template <class T>
struct alignas(16) Strip {
  T v[kThreadCols];

  __device__ void load(const T* p, int live, bool wide) {
    if (wide) {
      *this = *reinterpret_cast<const Strip*>(p);
    } else {
      for (int j = 0; j < kThreadCols; ++j) {
        if (j < live) v[j] = p[j];
      }
    }
  }
  __device__ void save(T* p, int live, bool wide) const {
    if (wide) {
      *reinterpret_cast<Strip*>(p) = *this;
    } else {
      for (int j = 0; j < kThreadCols; ++j) {
        if (j < live) p[j] = v[j];
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) merge_kernel(CudaMergeArgs args, bool aligned) {
  __shared__ alignas(16) float a_chunk[kRank][kCols];
  __shared__ alignas(16) float b_chunk[kRank][kRows];

  const int64_t tiles_x = (args.k + kCols - 1) / kCols;
  const int64_t row0 = blockIdx.x / tiles_x * kRows, col0 = blockIdx.x % tiles_x * kCols;
  const int ty = threadIdx.x / kThreadsX * kThreadRows, tx = threadIdx.x % kThreadsX * kThreadCols;
  const int64_t cols_left = args.k - col0 - tx;
  const int live =
      static_cast<int>(cols_left < kThreadCols ? (cols_left > 0 ? cols_left : 0) : kThreadCols);
  const bool wide = aligned && live == kThreadCols;
  T* const weight = static_cast<T*>(args.weight) + (row0 + ty) * args.weight_row + col0 + tx;

  Strip<T> w[kThreadRows];
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    if (row0 + ty + i < args.n) w[i].load(weight + i * args.weight_row, live, wide);
  }

  float acc[kThreadRows][kThreadCols] = {};
  for (int64_t r0 = 0; r0 < args.r; r0 += kRank) {
    // What lies outside the matrices counts as zero, so the sums below need no bounds.
    for (int i = threadIdx.x; i < kRank * kCols; i += kThreads) {
      const int64_t r = r0 + i / kCols, c = col0 + i % kCols;
      a_chunk[i / kCols][i % kCols] =
          r < args.r && c < args.k
              ? load_adapter(args.a, args.a_type, r * args.a_row + c * args.a_col)
              : 0.f;
    }
    for (int i = threadIdx.x; i < kRank * kRows; i += kThreads) {
      const int64_t r = r0 + i % kRank, n = row0 + i / kRank;
      b_chunk[i % kRank][i / kRank] =
          r < args.r && n < args.n
              ? load_adapter(args.b, args.b_type, n * args.b_row + r * args.b_col)
              : 0.f;
    }
    __syncthreads();
#pragma unroll 4
    for (int r = 0; r < kRank; ++r) {
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadCols; ++j) {
          acc[i][j] = fmaf(b_chunk[r][ty + i], a_chunk[r][tx + j], acc[i][j]);
        }
      }
    }
    __syncthreads();
  }

  const float scale = args.sign * *args.scaling;
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    if (row0 + ty + i >= args.n) break;
#pragma unroll
    for (int j = 0; j < kThreadCols; ++j) {
      if (j < live) store(&w[i].v[j], fmaf(scale, acc[i][j], to_float(w[i].v[j])));
    }
    w[i].save(weight + i * args.weight_row, live, wide);
  }
}

template <class T>
void launch(const CudaMergeArgs& args, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(args.weight) % 16 == 0 &&
                       args.weight_row * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  const int64_t tiles = ((args.n + kRows - 1) / kRows) * ((args.k + kCols - 1) / kCols);
  merge_kernel<T><<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(args, aligned);
}

}  // namespace

extern "C" const char* lk_cuda_merge(const CudaMergeArgs* args, int device, void* stream) {
  if (args->n == 0 || args->k == 0 || args->r == 0) return nullptr;
  // This library's own runtime (linked statically) may not have met the thread yet.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (args->weight_type == DType::f32) {
      launch<float>(*args, cuda_stream);
    } else if (args->weight_type == DType::f16) {
      launch<__half>(*args, cuda_stream);
    } else {
      launch<__nv_bfloat16>(*args, cuda_stream);
    }
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
