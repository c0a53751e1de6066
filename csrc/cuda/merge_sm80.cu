// In-place merge on CUDA cores, for every GPU from sm_80 up: W (n, k) += sum over one or two terms
// of sign * s * B (n, r) A (r, k), for one weight or for a list of them in one launch. Also the
// answer to whether that stays finite, without the write.
//
// Memory-bound at LoRA ranks, so the point is one pass over W with full-width accesses. A block
// owns a tile of 64 rows by 128 columns, a thread 4 rows by 8 columns. Each thread first asks for
// its part of W, then sums over the ranks while that is under way: chunks of A and of scaled B go
// through shared memory as float32, so their dtypes and strides matter only there. The terms are
// one long rank: sums are float32 in ascending rank, and W is rounded once.

#include <cstring>

#include "device.h"
#include "load_adapter.h"
#include "lora_kernels/cuda_merge.h"
#include "lora_kernels/merge_element.h"
#include "on_device.h"

namespace {

using namespace lora_kernels;
using device::from_float;
using device::to_float;

constexpr int kRows = 64, kCols = 128, kRank = 16;  // tile of W, chunk of the rank
constexpr int kThreadRows = 4, kThreadCols = 8;     // of one thread
constexpr int kThreadsX = kCols / kThreadCols;      // neighbours along a row of W
constexpr int kThreads = kThreadsX * kRows / kThreadRows;
constexpr int kBlocks = 2;  // on one multiprocessor: without it ptxas may aim at more, and spill

__device__ bool finite(float v) { return finite_f32(__float_as_uint(v)); }
__device__ bool finite(f16 v) { return finite_f16(v.bits); }
__device__ bool finite(bf16 v) { return finite_bf16(v.bits); }

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
__device__ void add_term(const CudaTerm& term, int64_t rows, int64_t cols, int64_t row0,
                         int64_t col0, int ty, int tx, float acc[kThreadRows][kThreadCols]) {
  alignas(16) __shared__ float a_chunk[kRank][kCols];
  alignas(16) __shared__ float b_chunk[kRank][kRows];

  const float scale = term.sign * *term.scaling;
  for (int64_t r0 = 0; r0 < term.r; r0 += kRank) {
    // What lies outside the matrices counts as zero, so the sums below need no bounds.
#pragma unroll 2
    for (int i = threadIdx.x; i < kRank * kCols; i += kThreads) {
      const int64_t r = r0 + i / kCols, c = col0 + i % kCols;
      a_chunk[i / kCols][i % kCols] =
          r < term.r && c < cols
              ? load_adapter(term.a, term.a_type, r * term.a_row + c * term.a_col)
              : 0.f;
    }
#pragma unroll 2
    for (int i = threadIdx.x; i < kRank * kRows; i += kThreads) {
      const int64_t r = r0 + i % kRank, n = row0 + i / kRank;
      float b = 0.f;
      if (r < term.r && n < rows) {
        b = load_adapter(term.b, term.b_type, n * term.b_row + r * term.b_col);
        b = merge_factor(b, scale);
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
          acc[i][j] = merge_step(acc[i][j], b_chunk[r][ty + i], a_chunk[r][tx + j]);
        }
      }
    }
    __syncthreads();
  }
}

template <int kTerms, int kCapacity>
struct Table {
  CudaMerge<kTerms> at[kCapacity];
  unsigned first_tile[kCapacity];
  int count;

  // The weight that a tile is of.
  __device__ int find(unsigned tile) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_tile[middle] <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// With kCheck W is only read, and *all_finite becomes false where an element would not be finite:
// all who write it write the same. Without it `all_finite` is null.
template <class T, bool kCheck, int kTerms, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocks)
    merge_kernel(const __grid_constant__ Table<kTerms, kCapacity> table, bool* all_finite) {
  const int mine = kCapacity == 1 ? 0 : table.find(blockIdx.x);
  const CudaMerge<kTerms>& args = table.at[mine];
  const unsigned tile = blockIdx.x - (kCapacity == 1 ? 0 : table.first_tile[mine]);
  const unsigned tiles_x = static_cast<unsigned>((args.k + kCols - 1) / kCols);
  const int64_t row0 = static_cast<int64_t>(tile / tiles_x) * kRows;
  const int64_t col0 = static_cast<int64_t>(tile % tiles_x) * kCols;
  const int ty = threadIdx.x / kThreadsX * kThreadRows, tx = threadIdx.x % kThreadsX * kThreadCols;
  const int64_t cols_left = args.k - col0 - tx;
  const int live =
      static_cast<int>(cols_left < kThreadCols ? (cols_left > 0 ? cols_left : 0) : kThreadCols);
  const bool aligned = reinterpret_cast<uintptr_t>(args.weight) % 16 == 0 &&
                       args.weight_row * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  const bool wide = aligned && live == kThreadCols;
  T* const weight = static_cast<T*>(args.weight) + (row0 + ty) * args.weight_row + col0 + tx;

  Strip<T> w[kThreadRows];
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    if (row0 + ty + i < args.n) w[i].load(weight + i * args.weight_row, live, wide);
  }

  float acc[kThreadRows][kThreadCols] = {};
#pragma unroll 1
  for (int t = 0; t < kTerms; ++t) {
    add_term(args.terms[t], args.n, args.k, row0, col0, ty, tx, acc);
  }

  bool ok = true;
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    if (row0 + ty + i >= args.n) break;
#pragma unroll
    for (int j = 0; j < kThreadCols; ++j) {
      if (j >= live) continue;
      w[i].v[j] = from_float<T>(merge_apply(to_float(w[i].v[j]), acc[i][j]));
      if constexpr (kCheck) ok = ok && finite(w[i].v[j]);
    }
    if constexpr (!kCheck) w[i].save(weight + i * args.weight_row, live, wide);
  }
  if constexpr (kCheck) {
    if (!ok) *all_finite = false;
  }
}

// One launch for up to kCapacity weights; those with no element have no tile.
template <class T, bool kCheck, int kTerms, int kCapacity>
void launch(const CudaMerge<kTerms>* list, int64_t count, bool* all_finite, cudaStream_t stream) {
  Table<kTerms, kCapacity> table;
  table.count = 0;
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (list[i].n == 0 || list[i].k == 0) continue;
    table.at[table.count] = list[i];
    table.first_tile[table.count++] = static_cast<unsigned>(tiles);
    tiles += tiles_of(list[i].n, kRows) * tiles_of(list[i].k, kCols);
  }
  if (tiles == 0) return;
  auto* const kernel = merge_kernel<T, kCheck, kTerms, kCapacity>;
  LK_LAUNCH(kernel, static_cast<unsigned>(tiles), kThreads, 0, stream, table, all_finite);
}

template <class T, bool kCheck, int kTerms>
void launch_list(const CudaMerge<kTerms>* list, int64_t count, bool* all_finite,
                 cudaStream_t stream) {
  if (kTerms == 2 || count == 1) return launch<T, kCheck, kTerms, 1>(list, 1, all_finite, stream);
  if constexpr (kTerms == 1) {
    for (int64_t i = 0; i < count; i += kMergeListSize) {
      const int64_t some = count - i < kMergeListSize ? count - i : kMergeListSize;
      launch<T, kCheck, kTerms, kMergeListSize>(list + i, some, all_finite, stream);
    }
  }
}

template <bool kCheck, int kTerms>
const char* run(const CudaMerge<kTerms>* list, int64_t count, DType type, bool* all_finite,
                int device, void* stream) {
  // This library's own runtime (linked statically) may not have met the thread yet.
  cudaError_t error = cudaSetDevice(device);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (kCheck && error == cudaSuccess) error = cudaMemsetAsync(all_finite, 1, 1, cuda_stream);
  if (error == cudaSuccess && count > 0) {
    if (type == DType::f32) {
      launch_list<float, kCheck>(list, count, all_finite, cuda_stream);
    } else if (type == DType::f16) {
      launch_list<f16, kCheck>(list, count, all_finite, cuda_stream);
    } else {
      launch_list<bf16, kCheck>(list, count, all_finite, cuda_stream);
    }
    error = cudaGetLastError();
  }
  return words(error);
}

}  // namespace

extern "C" const char* lk_cuda_merge(const CudaMerge<1>* list, int64_t count, DType weight_type,
                                     int device, void* stream) {
  return run<false>(list, count, weight_type, nullptr, device, stream);
}

extern "C" const char* lk_cuda_switch(const CudaMerge<2>* merge, DType weight_type, int device,
                                      void* stream) {
  return run<false>(merge, 1, weight_type, nullptr, device, stream);
}

extern "C" const char* lk_cuda_merge_is_finite(const CudaMerge<1>* list, int64_t count,
                                               DType weight_type, bool* finite, int device,
                                               void* stream) {
  return run<true>(list, count, weight_type, finite, device, stream);
}
