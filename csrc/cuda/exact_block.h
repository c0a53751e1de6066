// What merging and undoing a block of weights share on CUDA: where the block lies, the updates of a
// thread's weights, the bits of indices laid out over the threads, the checksum.
#pragma once

#include "exact_element.h"
#include "load_adapter.h"
#include "lora_kernels/cuda_exact.h"
#include "lora_kernels/exact_layout.h"

namespace lora_kernels {
namespace exact {

constexpr int kThreads = 256, kBlocks = 2;
constexpr int kOwn = 8;    // neighbouring weights of a thread, in each half of a block
constexpr int kRows = 4;   // blocks of a thread block
constexpr int kSlots = 4;  // halves of blocks whose updates are summed at once
constexpr int kHalf = kThreads * kOwn;
static_assert(kHalf == kExactBlock, "a block has two halves at most");
constexpr int kScanThreads = 256;

// Where a weight's results lie; all in the workspace.
struct Work {
  unsigned long long* fault;   // the smallest found, all ones where there is none
  unsigned long long* total;   // bytes of the body
  unsigned long long* offset;  // of a block's bytes in the body
  uint32_t* size;
  uint32_t* sum;
};

struct Job {
  CudaExact args;
  ExactLayout at;
  Work work;
  bool write;  // or only find out
};

enum : unsigned { kMalformed = 1, kNotFinite = 2, kMismatch = 3 };  // the smaller wins

__device__ inline void note(const Job& job, int64_t block, unsigned what) {
  atomicMin(job.work.fault, static_cast<unsigned long long>((block + 1) * 8 + what));
}
// Whether what was found stops this pass: anything where it writes, else what counts before all
// that blocks from `block` on may find.
__device__ inline bool faulty(const Job& job, int64_t block) {
  const unsigned long long found = *job.work.fault;
  return job.write ? found != ~0ull : found < static_cast<unsigned long long>(block + 1) * 8;
}

// One block of weights: where it lies and how many they are.
template <class T>
struct Place {
  T* home;
  int64_t row_stride, col_stride;
  int64_t block, row0, col0;
  int cols, count;

  __device__ Place(const Job& job, int64_t group, int64_t side) {
    const ExactLayout& at = job.at;
    block = group * at.per_row + side;
    row0 = group * at.group;
    col0 = side * kExactBlock;
    cols = static_cast<int>(side + 1 == at.per_row ? at.cols - col0 : kExactBlock);
    const int64_t left = at.rows - row0;
    count = static_cast<int>(left < at.group ? left : at.group) * cols;
    row_stride = job.args.weight_row;
    col_stride = job.args.weight_col;
    home = static_cast<T*>(job.args.weight) + row0 * row_stride + col0 * col_stride;
  }
  __device__ T* at(int p) const {
    return p < cols ? home + p * col_stride
                    : home + (p / cols) * row_stride + (p % cols) * col_stride;
  }
  __device__ uint32_t bits(int p) const { return Number<T>::bits(*at(p)); }
};

// Position of weight p's update in shared memory: a thread's eight do not share a bank.
__device__ inline int spread(int p) { return p + p / kOwn; }

constexpr int kUpdates = 2 * kHalf + 2 * kHalf / kOwn;

struct Shared {
  float update[kUpdates];
  uint32_t bytes[kExactMaxBlock + 1];  // of the residual, as words: 4 bytes a weight at most
  uint32_t warp_sum[kThreads / 32];
  uint32_t lane[16];
  bool stop;
};

// Sums the updates of the thread's weights in `rows` blocks of one row each, below one another.
// Slot y * kHalves + h is half h of block y.
template <int kHalves>
__device__ void sum_wide(const CudaTerm& term, int64_t row0, int rows, int64_t col0, int cols,
                         float (&acc)[kSlots][kOwn]) {
  constexpr int kHigh = kSlots / kHalves;
  const float scale = *term.scaling;
#pragma unroll 1
  for (int64_t r = 0; r < term.r; ++r) {
    float t[kHigh];
#pragma unroll
    for (int y = 0; y < kHigh; ++y) {
      const int64_t row = row0 + (y < rows ? y : rows - 1);
      t[y] = factor(load_adapter(term.b, term.b_type, row * term.b_row + r * term.b_col), scale);
    }
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const int p = h * kHalf + static_cast<int>(threadIdx.x) * kOwn;
      if (p >= cols) continue;
      float a[kOwn];
      const int live = cols - p < kOwn ? cols - p : kOwn;
      load_adapter_strip(term.a, term.a_type, r * term.a_row + (col0 + p) * term.a_col, term.a_col,
                         live, a);
#pragma unroll
      for (int y = 0; y < kHigh; ++y) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          acc[y * kHalves + h][j] = step(acc[y * kHalves + h][j], t[y], a[j]);
        }
      }
    }
  }
}

// The same for one block of several rows: its halves are slots 0 and 1.
__device__ inline void sum_narrow(const CudaTerm& term, int64_t row0, int cols, int count,
                                  float (&acc)[kSlots][kOwn]) {
  const float scale = *term.scaling;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int p = h * kHalf + static_cast<int>(threadIdx.x) * kOwn + j;
      if (p >= count) continue;
      const int64_t row = row0 + p / cols, col = p % cols;
#pragma unroll 1
      for (int64_t r = 0; r < term.r; ++r) {
        const float b = load_adapter(term.b, term.b_type, row * term.b_row + r * term.b_col);
        const float a = load_adapter(term.a, term.a_type, r * term.a_row + col * term.a_col);
        acc[h][j] = step(acc[h][j], factor(b, scale), a);
      }
    }
  }
}

// Sum of the values of the threads before this one; *all is that of all. Every thread takes part.
__device__ inline uint32_t scan(uint32_t value, uint32_t* warp_sum, uint32_t* all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = value;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, sum, by);
    if (lane >= by) sum += other;
  }
  if (lane == 31) warp_sum[warp] = sum;
  __syncthreads();
  uint32_t before = 0, total = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) before += warp_sum[i];
    total += warp_sum[i];
  }
  __syncthreads();
  *all = total;
  return before + sum - value;
}

// The checksum of a block whose weights are `merged(p)`, of its words `word(i)`. The result is
// thread 0's.
template <class Merged, class Word>
__device__ uint32_t checksum(int64_t block, int count, uint32_t words, uint32_t* lanes,
                             const Merged& merged, const Word& word) {
  if (threadIdx.x < 16) {
    uint32_t lane = lane_start(block, static_cast<int>(threadIdx.x));
#pragma unroll 4
    for (int p = static_cast<int>(threadIdx.x); p - static_cast<int>(threadIdx.x) < count;
         p += 16) {
      lane = mix(lane ^ (p < count ? merged(p) : 0u));
    }
    lanes[threadIdx.x] = lane;
  }
  __syncthreads();
  uint32_t sum = static_cast<uint32_t>(count);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 16; ++i) sum = mix(sum ^ lanes[i]);
    for (uint32_t i = 0; i < words; ++i) sum = mix(sum ^ word(i));
  }
  __syncthreads();
  return sum;
}

// The bits of a block's indices, one after the other: find(p, bad) is the interval of weight p. Of
// a thread whose weights have `mine` bits from `bit` on, put(p, interval, first bit) is called for
// each weight, where enter(bit, mine). Returns the bits of all.
template <class Find, class Enter, class Put>
__device__ uint32_t lay_out(int count, uint32_t* warp_sum, bool* bad, const Find& find,
                            const Enter& enter, const Put& put) {
  uint32_t all = 0;
#pragma unroll 1
  for (int h = 0; h < (count > kHalf ? 2 : 1); ++h) {
    const int first = h * kHalf + static_cast<int>(threadIdx.x) * kOwn;
    uint32_t mine = 0;
#pragma unroll 1
    for (int p = first; p < first + kOwn && p < count; ++p) {
      const Interval found = find(p, bad);
      *bad = *bad || found.empty();
      mine += static_cast<uint32_t>(found.width());
    }
    uint32_t total;
    uint32_t bit = all + scan(mine, warp_sum, &total);
    all += total;
    if (!enter(bit, mine)) continue;
#pragma unroll 1
    for (int p = first; p < first + kOwn && p < count; ++p) {
      const Interval found = find(p, bad);
      put(p, found, bit);
      bit += static_cast<uint32_t>(found.width());
    }
  }
  return all;
}

}  // namespace exact
}  // namespace lora_kernels
