// The producer of the sm_90a kernel: the warpgroup that fills the ring. Its first thread starts the
// copies of x and W; all of them store h, scaled and rounded once, and what of B no copy can
// address.
//
// With a plan the shrink has left each row's slot. A tile's update has the steps of every slot that
// has rows in it, one slot after the other, in any order: each row is of one. Rows of other slots
// are left as they lie, for consumers to select.
#pragma once

#include "ring_sm90.h"

namespace lora_kernels {

struct Sm90Job {
  device::TensorMap x, weight, b;
  CudaLinear args;
  int tiles_m, tiles_n;
  int64_t slot_rows;  // of the map of B from slot to slot; -1: no map, B is read element by element
};

// Slots that have rows in a tile.
struct Sm90Slots {
  int of[kSm90Rows], list[kSm90Rows];
  int count, others;  // rows without a slot
};

template <class Ring>
struct Sm90Producer {
  using T = typename Ring::T;
  static constexpr int kThreads = 128, kBarrier = 1;  // 0 is the barrier of __syncthreads

  const Ring& ring;
  const Sm90Job& job;
  Sm90Slots& slots;

  static __device__ void meet() { device::sync_some(kBarrier, kThreads); }

  __device__ void run() const {
    const CudaLinear& args = job.args;
    const int base = Ring::steps(args.k);
    const bool first = threadIdx.x == 0;
    bool waited = false;
    uint32_t n = 0;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < job.tiles_m * job.tiles_n; tile += gridDim.x) {
      const maps::TileAt at = maps::tile_at(tile, job.tiles_m, job.tiles_n);
      const int row0 = at.row * Ring::kRows, col0 = at.col * Ring::kCols;
      if (first) {
#pragma unroll 1
        for (int t = 0; t < base; ++t) {
          ring.wait_empty(n + t);
          device::arrive_expect(ring.full(n + t), Ring::kStageBytes);
          device::load_tile(ring.stage(n + t), &job.x, ring.full(n + t), row0, t * Ring::kStep);
          ring.load_right(&job.weight, n + t, col0, t * Ring::kStep);
        }
      }
      n += base;
      if (args.r == 0) continue;
      if (!waited) device::wait_for_launch_before();
      waited = true;
      // Others would take a phase for the one two before it: none runs ahead of the first.
      meet();
      if constexpr (Ring::kMulti) {
        n = updates(n, row0, col0);
      } else {
        n = update(n, row0, col0);
      }
    }
  }

  // The update of one adapter for all rows; the next step.
  __device__ uint32_t update(uint32_t n, int row0, int col0) const {
    const int64_t row = row0 + static_cast<int64_t>(threadIdx.x);
    return steps_of(n, 0, -1, true, row < job.args.m ? row : -1, col0);
  }

  // The updates of a tile's slots.
  __device__ uint32_t updates(uint32_t n, int row0, int col0) const {
    const int i = static_cast<int>(threadIdx.x);
    const int64_t row = row0 + static_cast<int64_t>(i);
    const int mine = row < job.args.m ? job.args.plan.row_slots[row] : -2;
    slots.of[i] = mine;
    if (i == 0) slots.count = slots.others = 0;
    meet();
    if (mine == -1) atomicAdd(&slots.others, 1);
    bool found = mine < 0;
    for (int j = 0; j < i && !found; ++j) found = slots.of[j] == mine;
    if (!found) slots.list[atomicAdd(&slots.count, 1)] = mine;
    meet();
    const int count = slots.count;
    if (count == 0) return steps_of(n, 0, -1, true, -1, col0, true);
#pragma unroll 1
    for (int s = 0; s < count; ++s) {
      const int slot = slots.list[s];
      const bool whole = count == 1 && slots.others == 0;
      n = steps_of(n, slot, whole ? -1 : slot, s == count - 1, mine == slot ? row : -1, col0);
    }
    return n;
  }

  // The steps of one slot, `rows_of` as in UpdateInfo; `row` is this thread's, -1: it has none of
  // the slot.
  __device__ uint32_t steps_of(uint32_t n, int slot, int rows_of, bool last, int64_t row, int col0,
                               bool nothing = false) const {
    const CudaLinear& args = job.args;
    const int most = static_cast<int>(args.r);
    const int32_t* const ranks = Ring::kMulti ? args.plan.slot_ranks : nullptr;
    const int rank = nothing ? 0 : ranks != nullptr ? ranks[slot] : most;
    const float scale = args.scaling[slot * args.scaling_stride];
    // Ranks up to the next 16 are multiplied too: a copy fills them with zeros only past the end.
    const bool copied = job.slot_rows >= 0 && (rank % 16 == 0 || rank == most);
    const int count = rank > 0 ? Ring::steps(rank) : 1;
#pragma unroll 1
    for (int t = 0; t < count; ++t, ++n) {
      const int at = t * Ring::kStep, left = rank - at;
      const int live = left < Ring::kStep ? left : Ring::kStep;
      ring.wait_empty(n);
      if (row >= 0) store_h(n, row, at, live, scale);
      if (!copied) store_b(n, slot, col0, at, live);
      device::fence_async();
      meet();
      if (threadIdx.x != 0) continue;
      ring.update(n) = {rows_of, (live + 15) / 16, last && t == count - 1};
      if (copied && live > 0) {
        device::arrive_expect(ring.full(n), Ring::kRightBytes);
        ring.load_right(&job.b, n, static_cast<int>(slot * job.slot_rows) + col0, at);
      } else {
        device::arrive(ring.full(n));
      }
    }
    return n;
  }

  // Eight of something into 16 bytes: what(j) as T's bits.
  template <class What>
  static __device__ void store_run(uint8_t* to, const What& what) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[w] = what(w * 2) | static_cast<uint32_t>(what(w * 2 + 1)) << 16;
    }
    device::store_16(to, words);
  }

  // This thread's row of h.
  __device__ void store_h(uint32_t n, int64_t row, int at, int live, float scale) const {
    const CudaLinear& args = job.args;
    const float* const h = args.h + row * args.h_row + at;
#pragma unroll 1
    for (int run = 0; run < (live + 15) / 16 * 2; ++run) {
      store_run(ring.stage(n) + maps::tile_offset<8>(static_cast<int>(threadIdx.x), run),
                [&](int j) {
                  const int k = run * 8 + j;
                  float sum = 0.f;
                  if (k < live) {
                    sum = h[k];
                    for (int s = 1; s < args.splits; ++s) sum += h[s * args.h_split + k];
                  }
                  return device::from_float<T>(sum * scale).bits;
                });
    }
  }

  // The tile of B of a slot, zeros where there is none.
  __device__ void store_b(uint32_t n, int slot, int col0, int at, int live) const {
    const CudaLinear& args = job.args;
    const T* const b = static_cast<const T*>(args.b.data) + slot * args.b_slot;
    const int depth = (live + 15) / 16 * 16;
    const int runs = Ring::kTurned ? Ring::kCols / 8 : depth / 8;
    const int rows = Ring::kTurned ? depth : Ring::kCols;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < rows * runs; i += kThreads) {
      const int row = i / runs, run = i % runs * 8;
      const int col = Ring::kTurned ? run : row, k = Ring::kTurned ? row : run;
      store_run(ring.right_run(n, col, k), [&](int j) {
        const int64_t y = col0 + col + (Ring::kTurned ? j : 0);
        const int r = k + (Ring::kTurned ? 0 : j);
        if (r >= live || y >= args.n) return uint16_t{0};
        const int64_t a = Ring::kTurned ? at + r : y, c = Ring::kTurned ? y : at + r;
        return b[a * args.b.row + c * args.b.col].bits;
      });
    }
  }
};

}  // namespace lora_kernels
