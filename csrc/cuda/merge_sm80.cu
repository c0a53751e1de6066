// In-place merge on CUDA cores, for every GPU from sm_80 up: W (n, k) += sum over one or two terms
// of sign * s * B (n, r) A (r, k). Also the answer to whether that stays finite, without the write.
//
// Memory-bound at LoRA ranks, so the point is one pass over W with full-width accesses. A block
// owns a tile of 64 rows by 128 columns, a thread 4 rows by 8 columns. Each thread first asks for
// its part of W, then sums over the ranks while that is under way: chunks of A and of scaled B go
// through shared memory as float32, so their dtypes and strides matter only there. The terms are
// one long rank: sums are float32 in ascending rank, and W is rounded once.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "lora_kernels/cuda_merge.h"
#include "lora_kernels/merge_element.h"

namespace {

using lora_kernels::CudaMergeArgs;
using lora_kernels::CudaTerm;
using lora_kernels::DType;

constexpr int kRows = 64, kCols = 128, kRank = 16;  // tile of W, chunk of the rank
constexpr int kThreadRows = 4, kThreadCols = 8;     // of one thread
constexpr int kThreadsX = kCols / kThreadCols;      // neighbours along a row of W
constexpr int kThreads = kThreadsX * kRows / kThreadRows;
constexpr int kBlocks = 2;  // on one multiprocessor: without it ptxas may aim at more, and spill

__device__ float to_float(float v) { return v; }
__device__ float to_float(__half v) { return __half2float(v); }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ void store(float* p, float v) { *p = v; }
__device__ void store(__half* p, float v) { *p = __float2half_rn(v); }
__device__ void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }

__device__ bool finite(float v) { return lora_kernels::finite_f32(__float_as_uint(v)); }
__device__ bool finite(__half v) { return lora_kernels::finite_f16(__half_as_ushort(v)); }
__device__ bool finite(__nv_bfloat16 v) {
  return lora_kernels::finite_bf16(__bfloat16_as_ushort(v));
}

// Element `i` of an adapter; the branch is the same for the whole grid.
__device__ float load_adapter(const void* p, DType type, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(p)[i];
  if (type == DType::f16) return to_float(static_cast<const __half*>(p)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
}

// The thread's eight columns of one row: 16-byte accesses where the row allows, else one by one up
// to `live`.
template <class T>
struct Strip {
  static constexpr int kVectors = kThreadCols * sizeof(T) / sizeof(uint4);
  T v[kThreadCols];

  __device__ void load(const T* p, int live, bool wide) {
    if (wide) {
      uint4 vectors[kVectors];
#pragma unroll
      for (int j = 0; j < kVectors; ++j) vectors[j] = reinterpret_cast<const uint4*>(p)[j];
      memcpy(v, vectors, sizeof(v));
    } else {
#pragma unroll
      for (int j = 0; j < kThreadCols; ++j) {
        if (j < live) v[j] = p[j];
      }
    }
  }
  __device__ void save(T* p, int live, bool wide) const {
    if (wide) {
      uint4 vectors[kVectors];
      memcpy(vectors, v, sizeof(v));
      // A plain assignment may be split into narrower stores.
#pragma unroll
      for (int j = 0; j < kVectors; ++j) __stwb(reinterpret_cast<uint4*>(p) + j, vectors[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kThreadCols; ++j) {
        if (j < live) p[j] = v[j];
      }
    }
  }
};

// Adds the term's part of the sums; every thread of the block takes part.
__device__ void add_term(const CudaTerm& term, const CudaMergeArgs& args, int64_t row0,
                         int64_t col0, int ty, int tx, float acc[kThreadRows][kThreadCols]) {
  __shared__ alignas(16) float a_chunk[kRank][kCols];
  __shared__ alignas(16) float b_chunk[kRank][kRows];

  const float scale = term.sign * *term.scaling;
  for (int64_t r0 = 0; r0 < term.r; r0 += kRank) {
    // What lies outside the matrices counts as zero, so the sums below need no bounds.
#pragma unroll 2
    for (int i = threadIdx.x; i < kRank * kCols; i += kThreads) {
      const int64_t r = r0 + i / kCols, c = col0 + i % kCols;
      a_chunk[i / kCols][i % kCols] =
          r < term.r && c < args.k
              ? load_adapter(term.a, term.a_type, r * term.a_row + c * term.a_col)
              : 0.f;
    }
#pragma unroll 2
    for (int i = threadIdx.x; i < kRank * kRows; i += kThreads) {
      const int64_t r = r0 + i % kRank, n = row0 + i / kRank;
      float b = 0.f;
      if (r < term.r && n < args.n) {
        b = load_adapter(term.b, term.b_type, n * term.b_row + r * term.b_col);
        b = lora_kernels::merge_factor(b, scale);
      }
      b_chunk[i % kRank][i / kRank] = b;
    }
    __syncthreads();
#pragma unroll 2
    for (int r = 0; r < kRank; ++r) {
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadCols; ++j) {
          acc[i][j] = lora_kernels::merge_step(acc[i][j], b_chunk[r][ty + i], a_chunk[r][tx + j]);
        }
      }
    }
    __syncthreads();
  }
}

// With kCheck W is only read, and *all_finite becomes false where an element would not be finite:
// all who write it write the same. Without it `all_finite` is null.
template <class T, bool kCheck>
__global__ void __launch_bounds__(kThreads, kBlocks)
    merge_kernel(const __grid_constant__ CudaMergeArgs args, bool aligned, unsigned tiles_x,
                 bool* all_finite) {
  const int64_t row0 = static_cast<int64_t>(blockIdx.x / tiles_x) * kRows;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x % tiles_x) * kCols;
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
#pragma unroll 1
  for (int t = 0; t < args.num_terms; ++t) {
    add_term(args.terms[t], args, row0, col0, ty, tx, acc);
  }

  bool ok = true;
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    if (row0 + ty + i >= args.n) break;
#pragma unroll
    for (int j = 0; j < kThreadCols; ++j) {
      if (j >= live) continue;
      store(&w[i].v[j], lora_kernels::merge_apply(to_float(w[i].v[j]), acc[i][j]));
      if constexpr (kCheck) ok = ok && finite(w[i].v[j]);
    }
    if constexpr (!kCheck) w[i].save(weight + i * args.weight_row, live, wide);
  }
  if constexpr (kCheck) {
    if (!ok) *all_finite = false;
  }
}

template <class T, bool kCheck>
void launch(const CudaMergeArgs& args, bool* all_finite, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(args.weight) % 16 == 0 &&
                       args.weight_row * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  const int64_t tiles_x = (args.k + kCols - 1) / kCols;
  const int64_t tiles = (args.n + kRows - 1) / kRows * tiles_x;
  merge_kernel<T, kCheck><<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(
      args, aligned, static_cast<unsigned>(tiles_x), all_finite);
}

template <bool kCheck>
const char* run(const CudaMergeArgs& args, bool* all_finite, int device, void* stream) {
  // This library's own runtime (linked statically) may not have met the thread yet.
  cudaError_t error = cudaSetDevice(device);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (kCheck && error == cudaSuccess) error = cudaMemsetAsync(all_finite, 1, 1, cuda_stream);
  if (error == cudaSuccess && args.n > 0 && args.k > 0) {
    if (args.weight_type == DType::f32) {
      launch<float, kCheck>(args, all_finite, cuda_stream);
    } else if (args.weight_type == DType::f16) {
      launch<__half, kCheck>(args, all_finite, cuda_stream);
    } else {
      launch<__nv_bfloat16, kCheck>(args, all_finite, cuda_stream);
    }
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

extern "C" const char* lk_cuda_merge(const CudaMergeArgs* args, int device, void* stream) {
  return run<false>(*args, nullptr, device, stream);
}

extern "C" const char* lk_cuda_merge_is_finite(const CudaMergeArgs* args, bool* finite, int device,
                                               void* stream) {
  return run<true>(*args, finite, device, stream);
}
