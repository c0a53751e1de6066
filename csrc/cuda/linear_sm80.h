// The linear layer with its low-rank update in one product on tensor cores, for every GPU from
// sm_80 up: y (m, n) = x W^T + bias + s * h B^T.
//
// The sum runs over x and W, then on over h and B in the same accumulators: the update costs r / k
// more of the base product, and y is written once. h comes from shrink_kernel in float32; it is
// scaled and rounded once on its way into shared memory. With a plan a tile takes rows in the order
// of their slots. Each slot of the tile has its own steps, whose products go only into its own
// rows' sums, by selection: what is Inf or NaN in one adapter stays in its rows.
//
// Sums are in order and nothing is added by atomics: the same call gives the same bits, whatever
// the tile.
#pragma once

#include "gemm_tile.h"
#include "lora_kernels/cuda_linear.h"

namespace lora_kernels {
namespace {

using device::from_float;
using device::to_float;

struct LinearJob {
  CudaLinear args;
  CudaOperand x, weight, b;
  int tiles_m, tiles_n;
};
struct ShrinkJob {
  CudaShrink args;
  CudaOperand x, a;
  int64_t part;  // of the sum, a multiple of kDepth
};

__device__ inline int tiles_of(int64_t size) {
  return static_cast<int>((size + kDepth - 1) / kDepth);
}

// The row of x and y at a place of the batch, -1 where there is none.
__device__ inline int64_t row_at(const CudaPlan& plan, int64_t place, int64_t m) {
  if (plan.row_order == nullptr) return place < m ? place : -1;
  if (place >= plan.num_positions) return -1;
  const int64_t row = plan.row_order[place];
  return row < m ? row : -1;
}

// Slots that have rows among a tile's places, in any order: each row is of one.
struct TileSlots {
  int count, slot[64];

  __device__ void find(const CudaPlan& plan, int64_t first, int rows) {
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    for (int s = static_cast<int>(threadIdx.x); s < plan.num_slots; s += blockDim.x) {
      const int begin = plan.segment_starts[s + 1], end = plan.segment_starts[s + 2];
      if (begin < end && begin < first + rows && end > first) slot[atomicAdd(&count, 1)] = s;
    }
    __syncthreads();
  }
};

// Eight elements of h, scaled and rounded, into shared memory; those from `live` on as zeros.
template <class T>
__device__ void copy_h(uint8_t* to, const CudaLinear& args, int64_t offset, int live, float scale) {
#pragma unroll 1
  for (int j = 0; j < 8; ++j) {
    float sum = 0.f;
    if (j < live) {
      sum = args.h[offset + j];
      for (int s = 1; s < args.splits; ++s) sum += args.h[s * args.h_split + offset + j];
    }
    device::write_2(to, j, from_float<T>(sum * scale).bits);
  }
}

template <class Tile, bool kMulti>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    linear_kernel(const __grid_constant__ LinearJob job) {
  using T = typename Tile::T;
  const CudaLinear& args = job.args;
  uint8_t* const shared = device::dynamic_shared();
  const maps::TileAt tile = maps::tile_at(blockIdx.x, job.tiles_m, job.tiles_n);
  const int64_t first = static_cast<int64_t>(tile.row) * Tile::kRows;
  const int64_t col0 = static_cast<int64_t>(tile.col) * Tile::kCols;
  TileSlots* slots = nullptr;
  if constexpr (kMulti) {
    __shared__ TileSlots found;
    slots = &found;
    slots->find(args.plan, first, Tile::kRows);
  }

  int64_t row[Tile::kLeftRounds], offset[Tile::kLeftRounds];
#pragma unroll
  for (int i = 0; i < Tile::kLeftRounds; ++i) {
    row[i] = Tile::has_left(i) ? row_at(args.plan, first + Tile::left_run(i) / 4, args.m) : -1;
    offset[i] = row[i] < 0 ? -1 : row[i] * args.x.row;
  }

  const int base = tiles_of(args.k), by_slot = tiles_of(args.r);
  const int count = base + by_slot * (kMulti ? slots->count : args.r > 0);
  float acc[Tile::kMs][Tile::kNs][4] = {};
  const auto copy = [&](int t, uint8_t* stage) {
    if (t < base) {
      const int64_t at = static_cast<int64_t>(t) * kDepth;
      Tile::copy_left(stage, job.x, offset, at, args.k);
      Tile::copy_right(stage, job.weight, col0, args.n, at, args.k);
      return;
    }
    const int slot = kMulti ? slots->slot[(t - base) / by_slot] : 0;
    const int64_t at = static_cast<int64_t>((t - base) % by_slot) * kDepth;
    const int64_t rank =
        kMulti && args.plan.slot_ranks != nullptr ? args.plan.slot_ranks[slot] : args.r;
    const float scale = args.scaling[slot * args.scaling_stride];
#pragma unroll
    for (int i = 0; i < Tile::kLeftRounds; ++i) {
      if (!Tile::has_left(i)) continue;
      const int run = Tile::left_run(i) % 4;
      bool mine = row[i] >= 0;
      if constexpr (kMulti) {
        const int64_t place = first + Tile::left_run(i) / 4;
        mine = mine && place >= args.plan.segment_starts[slot + 1] &&
               place < args.plan.segment_starts[slot + 2];
      }
      const int64_t k = at + run * 8, left = mine ? rank - k : 0;
      copy_h<T>(stage + maps::tile_offset<4>(Tile::left_run(i) / 4, run), args,
                row[i] * args.h_row + k, static_cast<int>(left < 8 ? left : 8), scale);
    }
    CudaOperand b = job.b;
    b.data = static_cast<const T*>(b.data) + slot * args.b_slot;
    Tile::copy_right(stage, b, col0, args.n, at, rank);
  };
  Tile::pipeline(shared, count, copy, [&](int t, const uint8_t* stage) {
    if constexpr (kMulti) {
      if (t >= base) {
        float product[Tile::kMs][Tile::kNs][4] = {};
        Tile::step(stage, product);
        const int slot = slots->slot[(t - base) / by_slot];
        const int64_t begin = args.plan.segment_starts[slot + 1] - first;
        const int64_t end = args.plan.segment_starts[slot + 2] - first;
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < Tile::kMs; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int r = Tile::warp_row() + i * 16 + maps::acc_row(lane, e);
            if (r < begin || r >= end) continue;
#pragma unroll
            for (int j = 0; j < Tile::kNs; ++j) acc[i][j][e] += product[i][j][e];
          }
        }
        return;
      }
    }
    Tile::step(stage, acc);
  });

  const T* const bias = static_cast<const T*>(args.bias);
  Tile::for_each_pair(acc, [&](int r, int c, const float* value) {
    const int64_t to = row_at(args.plan, first + r, args.m);
    if (to < 0) return;
    // Adding nothing would make +0 of -0: rows of the base alone are left as they are.
    if (kMulti && args.add && first + r < args.plan.segment_starts[1]) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t col = col0 + c + e;
      if (col >= args.n) continue;
      T* const y = static_cast<T*>(args.y) + to * args.y_row + col * args.y_col;
      float v = value[e];
      if (bias != nullptr) v += to_float(bias[col * args.bias_stride]);
      if (args.add) v += to_float(*y);
      *y = from_float<T>(v);
    }
  });
}

// The slot of a block's rows; the blocks of slot 0 do it for as many rows without a slot as well.
__device__ inline void store_row_slots(const CudaPlan& plan, int slot, int64_t first, int64_t last,
                                       int rows, int64_t m) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= rows) return;
  const int64_t row = first + i < last ? row_at(plan, first + i, m) : -1;
  if (row >= 0) plan.row_slots[row] = slot;
  const int64_t place = int64_t{blockIdx.x} * rows + i;
  if (slot > 0 || place >= plan.segment_starts[1]) return;
  const int64_t alone = row_at(plan, place, m);
  if (alone >= 0) plan.row_slots[alone] = -1;
}

// A block for 64 rows of a slot, some of the rank, and one part of the sum.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    shrink_kernel(const __grid_constant__ ShrinkJob job) {
  const CudaShrink& args = job.args;
  const CudaPlan& plan = args.plan;
  uint8_t* const shared = device::dynamic_shared();
  if (args.cleared != nullptr && blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < args.num_cleared; i += Tile::kThreads) {
      args.cleared[i] = 0;
    }
  }
  const int split = blockIdx.y % args.splits;
  const int64_t col0 = static_cast<int64_t>(blockIdx.y / args.splits) * Tile::kCols;
  const bool by_slot = plan.row_order != nullptr;
  const int slot = by_slot ? blockIdx.z : 0;
  int64_t first = static_cast<int64_t>(blockIdx.x) * Tile::kRows, last = args.m, rank = args.r;
  if (by_slot) {
    first += plan.segment_starts[slot + 1];
    last = plan.segment_starts[slot + 2];
    if (plan.slot_ranks != nullptr) rank = plan.slot_ranks[slot];
  }
  if (plan.row_slots != nullptr && blockIdx.y == 0) {
    store_row_slots(plan, slot, first, last, Tile::kRows, args.m);
  }
  if (first >= last) return;

  int64_t offset[Tile::kLeftRounds];
#pragma unroll
  for (int i = 0; i < Tile::kLeftRounds; ++i) {
    const int64_t place = first + Tile::left_run(i) / 4;
    const int64_t row = Tile::has_left(i) && place < last ? row_at(plan, place, args.m) : -1;
    offset[i] = row < 0 ? -1 : row * args.x.row;
  }
  const int64_t begin = split * job.part;
  const int64_t end = begin + job.part < args.k ? begin + job.part : args.k;
  CudaOperand a = job.a;
  a.data = static_cast<const typename Tile::T*>(a.data) + slot * args.a_slot;
  float acc[Tile::kMs][Tile::kNs][4] = {};
  Tile::pipeline(
      shared, end > begin ? tiles_of(end - begin) : 0,
      [&](int t, uint8_t* stage) {
        const int64_t at = begin + static_cast<int64_t>(t) * kDepth;
        Tile::copy_left(stage, job.x, offset, at, end);
        Tile::copy_right(stage, a, col0, rank, at, end);
      },
      [&](int, const uint8_t* stage) { Tile::step(stage, acc); });

  Tile::for_each_pair(acc, [&](int r, int c, const float* value) {
    const int64_t to = first + r < last ? row_at(plan, first + r, args.m) : -1;
    if (to < 0) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t col = col0 + c + e;
      if (col < args.r) {
        args.h[(split * args.m + to) * args.r + col] = col < rank ? value[e] : 0.f;
      }
    }
  });
}

// ---- the host's part ----

inline CudaOperand operand(const CudaMatrix& from, int64_t slot_stride) {
  const bool aligned = from.col == 1 && from.row % 8 == 0 && slot_stride % 8 == 0 &&
                       reinterpret_cast<uintptr_t>(from.data) % 16 == 0;
  return {from.data, from.row, from.col, aligned};
}

template <class Tile, bool kMulti>
void launch_linear(const CudaLinear& args, cudaStream_t stream) {
  const int64_t places = kMulti ? args.plan.num_positions : args.m;
  LinearJob job = {args,
                   operand(args.x, 0),
                   operand(args.weight, 0),
                   operand(args.b, args.b_slot),
                   static_cast<int>((places + Tile::kRows - 1) / Tile::kRows),
                   static_cast<int>((args.n + Tile::kCols - 1) / Tile::kCols)};
  const int64_t tiles = int64_t{job.tiles_m} * job.tiles_n;
  if (tiles == 0) return;
  auto* const kernel = linear_kernel<Tile, kMulti>;
  LK_LAUNCH(kernel, static_cast<unsigned>(tiles), Tile::kThreads, Tile::kShared, stream, job);
}

template <class Tile>
void launch_shrink(const CudaShrink& args, cudaStream_t stream) {
  const bool by_slot = args.plan.row_order != nullptr;
  const int64_t part = (args.k + args.splits - 1) / args.splits;
  const ShrinkJob job = {args, operand(args.x, 0), operand(args.a, args.a_slot),
                         (part + kDepth - 1) / kDepth * kDepth};
  const int64_t places = by_slot ? args.plan.num_positions : args.m;
  const dim3 grid = {static_cast<unsigned>((places + Tile::kRows - 1) / Tile::kRows),
                     static_cast<unsigned>((args.r + Tile::kCols - 1) / Tile::kCols * args.splits),
                     static_cast<unsigned>(by_slot ? args.plan.num_slots : 1)};
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  auto* const kernel = shrink_kernel<Tile>;
  LK_LAUNCH(kernel, grid, Tile::kThreads, Tile::kShared, stream, job);
}

template <class T>
void run_shrink(const CudaShrink& args, cudaStream_t stream) {
  if (args.turned) {
    launch_shrink<GemmTile<T, 64, 64, 2, 2, true>>(args, stream);
  } else if (args.r <= 16) {
    launch_shrink<GemmTile<T, 64, 16, 4, 1, false>>(args, stream);
  } else {
    launch_shrink<GemmTile<T, 64, 64, 2, 2, false>>(args, stream);
  }
}

template <class T>
void run_linear(const CudaLinear& args, int rows, cudaStream_t stream) {
  if (args.plan.row_order != nullptr) {
    if (rows == 16) return launch_linear<GemmTile<T, 16, 64, 1, 4, false>, true>(args, stream);
    return launch_linear<GemmTile<T, 64, 64, 2, 2, false>, true>(args, stream);
  }
  if (args.turned) {
    if (rows == 128) return launch_linear<GemmTile<T, 128, 128, 2, 4, true>, false>(args, stream);
    return launch_linear<GemmTile<T, 64, 64, 2, 2, true>, false>(args, stream);
  }
  if (rows == 128) return launch_linear<GemmTile<T, 128, 128, 2, 4, false>, false>(args, stream);
  if (rows == 64) return launch_linear<GemmTile<T, 64, 64, 2, 2, false>, false>(args, stream);
  launch_linear<GemmTile<T, 16, 64, 1, 4, false>, false>(args, stream);
}

}  // namespace
}  // namespace lora_kernels
