// A tile of a product on tensor cores: copies into shared memory, and a step of the sum over it.
//
// Three stages of 32 along the sum, or what the kernel asks for. Rows of the left operand are 64
// bytes; the right operand comes as it lies in memory, (columns, sum) or, kTurned, (sum, columns),
// and ldmatrix turns it.
#pragma once

#include "device.h"
#include "lora_kernels/mma_maps.h"

namespace lora_kernels {

constexpr int kDepth = 32;

// A matrix in device memory; strides count elements. `aligned`: rows are adjacent elements, and
// every eighth of them is at 16 bytes.
struct CudaOperand {
  const void* data;
  int64_t row, col;
  bool aligned;
};

// Eight elements of a row into shared memory, those from `live` on as zeros. kOnce: no other block
// will read them.
template <class T, bool kOnce = false>
__device__ __forceinline__ void copy_run(uint8_t* to, const CudaOperand& from, int64_t offset,
                                         int live) {
  const T* const p = static_cast<const T*>(from.data);
  if (from.aligned) {
    live = live < 0 ? 0 : live > 8 ? 8 : live;
    const T* const at = live > 0 ? p + offset : p;
    const int bytes = live * static_cast<int>(sizeof(T));
    if constexpr (kOnce) {
      device::async_stream_16(to, at, bytes);
    } else {
      device::async_copy_16(to, at, bytes);
    }
    return;
  }
  // Rolled up: this is the way of odd sizes and strides, and it is inlined often.
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    device::write_2(to, i, i < live ? p[offset + i * from.col].bits : uint16_t{0});
  }
}

template <class Element, int kTileRows, int kTileCols, int kWarpsM, int kWarpsN, bool kTurn,
          int kStageCount = 3>
struct GemmTile {
  using T = Element;
  static constexpr int kRows = kTileRows, kCols = kTileCols, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr bool kTurned = kTurn;
  static constexpr int kStages = kStageCount;
  static constexpr int kResident = kRows == 128 ? 1 : 4;  // on a multiprocessor, at least
  static constexpr int kMs = kRows / kWarpsM / 16, kNs = kCols / kWarpsN / 8;
  static_assert(kMs > 0 && kNs % 2 == 0, "a warp has 16 rows and 16 columns at least");
  static constexpr int kLeftBytes = kRows * kDepth * 2;
  static constexpr int kStageBytes = kLeftBytes + kCols * kDepth * 2;
  static constexpr int kShared = kStages * kStageBytes;
  static_assert(kShared <= 48 * 1024, "more must be asked for with cudaFuncSetAttribute");
  static constexpr int kRightRuns = kTurned ? kCols / 8 : kDepth / 8;
  // Runs of the operands that a thread copies; the last round may be a part.
  static constexpr int kLeftRounds = (kRows * 4 + kThreads - 1) / kThreads;
  static constexpr int kRightRounds = (kCols * 4 + kThreads - 1) / kThreads;
  using Sums = float[kMs][kNs][4];

  static __device__ int left_run(int round) {
    return round * kThreads + static_cast<int>(threadIdx.x);
  }
  static __device__ bool has_left(int round) {
    return kRows * 4 % kThreads == 0 || left_run(round) < kRows * 4;
  }

  // The left operand's runs: offset[round] is that of the row, or -1 where there is none.
  template <bool kOnce = false>
  static __device__ void copy_left(uint8_t* stage, const CudaOperand& from,
                                   const int64_t (&offset)[kLeftRounds], int64_t at, int64_t end) {
#pragma unroll
    for (int i = 0; i < kLeftRounds; ++i) {
      if (!has_left(i)) continue;
      const int row = left_run(i) / 4, run = left_run(i) % 4;
      const int64_t k = at + run * 8;
      const int64_t left = offset[i] < 0 ? 0 : end - k;
      copy_run<T, kOnce>(stage + maps::tile_offset<4>(row, run), from, offset[i] + k * from.col,
                         static_cast<int>(left < 8 ? left : 8));
    }
  }

  // The right operand's, from column `col0` of the product and `at` of the sum on.
  static __device__ void copy_right(uint8_t* stage, const CudaOperand& from, int64_t col0,
                                    int64_t cols, int64_t at, int64_t end) {
#pragma unroll
    for (int i = 0; i < kRightRounds; ++i) {
      const int index = i * kThreads + static_cast<int>(threadIdx.x);
      if (kCols * 4 % kThreads != 0 && index >= kCols * 4) continue;
      const int row = index / kRightRuns, run = index % kRightRuns;
      const int64_t y = row + (kTurned ? at : col0), x = run * 8 + (kTurned ? col0 : at);
      const int64_t left = y < (kTurned ? end : cols) ? (kTurned ? cols : end) - x : 0;
      copy_run<T>(stage + kLeftBytes + maps::tile_offset<kRightRuns>(row, run), from,
                  y * from.row + x * from.col, static_cast<int>(left < 8 ? left : 8));
    }
  }

  static __device__ int warp_row() { return threadIdx.x / 32 / kWarpsN * (kRows / kWarpsM); }
  static __device__ int warp_col() { return threadIdx.x / 32 % kWarpsN * (kCols / kWarpsN); }

  // acc += the stage's part of the sum.
  static __device__ void step(const uint8_t* stage, Sums& acc) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t right[kNs / 2][4];
#pragma unroll
      for (int j = 0; j < kNs / 2; ++j) {
        const int col = warp_col() + j * 16;
        const int offset = kTurned ? maps::tile_offset<kRightRuns>(k * 16 + maps::turned_row(lane),
                                                                   col / 8 + maps::turned_run(lane))
                                   : maps::tile_offset<kRightRuns>(col + maps::right_row(lane),
                                                                   k * 2 + maps::right_run(lane));
        device::load_matrices<kTurned>(right[j], stage + kLeftBytes + offset);
      }
#pragma unroll
      for (int i = 0; i < kMs; ++i) {
        uint32_t left[4];
        device::load_matrices<false>(
            left, stage + maps::tile_offset<4>(warp_row() + i * 16 + maps::left_row(lane),
                                               k * 2 + maps::left_run(lane)));
#pragma unroll
        for (int j = 0; j < kNs; ++j) {
          device::multiply<T>(acc[i][j], left, right[j / 2][j % 2 * 2],
                              right[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // Runs copy(t, stage) for every t below `count`, two ahead of use(t, stage).
  template <class Copy, class Use>
  static __device__ void pipeline(uint8_t* shared, int count, const Copy& copy, const Use& use) {
#pragma unroll 1
    for (int t = 0; t < kStages - 1; ++t) {
      if (t < count) copy(t, shared + t * kStageBytes);
      device::async_commit();
    }
#pragma unroll 1
    for (int t = 0; t < count; ++t) {
      // All threads' copies of stage t have landed, and all have used stage t - 1.
      device::async_wait<kStages - 2>();
      __syncthreads();
      const int next = t + kStages - 1;
      if (next < count) copy(next, shared + next % kStages * kStageBytes);
      device::async_commit();
      use(t, shared + t % kStages * kStageBytes);
    }
  }

  // visit(row, column, &value of it and the next column) over what the thread holds.
  template <class Visit>
  static __device__ void for_each_pair(Sums& acc, const Visit& visit) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kMs; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < kNs; ++j) {
          visit(warp_row() + i * 16 + maps::acc_row(lane, 2 * half),
                warp_col() + j * 8 + maps::acc_col(lane, 0), &acc[i][j][2 * half]);
        }
      }
    }
  }
};

}  // namespace lora_kernels
