// The tiles of the sm_90a kernels: a ring of stages in shared memory that one warpgroup fills and
// two use, and the products over a stage.
//
// Each stage has two barriers: `full` ends a phase when its bytes have come, `empty` when all warps
// of the consumers have used them. Step n is in stage n % kStages, its phase is n / kStages.
#pragma once

#include "device_sm90.h"
#include "lora_kernels/cuda_sm90.h"

namespace lora_kernels {

// What a stage with a part of an update holds, beside the operands.
struct UpdateInfo {
  int slot;   // of the rows that it is for; -1: all rows of the tile
  int steps;  // of 16 ranks; 0: nothing
  bool last;  // of this tile
};

template <class Element, int kTileCols, bool kTurn, bool kSeveral>
struct Sm90Ring {
  using T = Element;
  static constexpr int kRows = kSm90Rows, kCols = kTileCols, kStep = kSm90Step;
  static constexpr bool kTurned = kTurn, kMulti = kSeveral;  // adapters
  static constexpr int kStages = kCols == 256 ? 4 : 6;
  static constexpr int kLeftBytes = kRows * maps::kRowBytes;
  static constexpr int kRightBytes = kCols * maps::kRowBytes;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;
  // The swizzle is a pattern of address bits: stages begin where it does.
  static constexpr int kShared = kStages * kStageBytes + maps::kPatternBytes;
  static constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);

  struct State {
    uint64_t full[kStages], empty[kStages];
    UpdateInfo update[kStages];
  };
  uint8_t* stages;
  uint32_t address;  // of the stages, in shared memory
  State* state;

  __device__ uint8_t* stage(uint32_t n) const { return stages + n % kStages * kStageBytes; }
  __device__ uint64_t* full(uint32_t n) const { return state->full + n % kStages; }
  __device__ uint64_t* empty(uint32_t n) const { return state->empty + n % kStages; }
  __device__ UpdateInfo& update(uint32_t n) const { return state->update[n % kStages]; }
  __device__ static uint32_t phase(uint32_t n) { return n / kStages % 2; }
  static __host__ __device__ int steps(int64_t size) {
    return static_cast<int>((size + kStep - 1) / kStep);
  }

  __device__ static Sm90Ring start(State* state) {
    uint8_t* const shared = device::dynamic_shared();
    const uint32_t past = device::shared_address(shared) % maps::kPatternBytes;
    uint8_t* const stages = shared + (maps::kPatternBytes - past) % maps::kPatternBytes;
    const Sm90Ring ring = {stages, device::shared_address(stages), state};
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        device::barrier_init(ring.full(i), 1);
        device::barrier_init(ring.empty(i), 4 * kConsumers);
      }
      device::fence_barriers();
    }
    __syncthreads();
    return ring;
  }

  // ---- for the producer ----

  // Until step n - kStages was used.
  __device__ void wait_empty(uint32_t n) const { device::wait(empty(n), phase(n) ^ 1); }

  // kStep of the sum, from `at` on, of the right operand's columns from col0 on.
  __device__ void load_right(const device::TensorMap* map, uint32_t n, int col0, int at) const {
    uint8_t* const to = stage(n) + kLeftBytes;
    if constexpr (kTurned) {
#pragma unroll
      for (int box = 0; box < kCols / 64; ++box) {
        device::load_tile(to + box * kStep * maps::kRowBytes, map, full(n), at, col0 + box * 64);
      }
    } else {
      device::load_tile(to, map, full(n), col0, at);
    }
  }

  // Where eight elements of the right operand begin: of column `col` from `k` of the sum on, or,
  // turned, of `k` from column `col` on.
  __device__ uint8_t* right_run(uint32_t n, int col, int k) const {
    uint8_t* const right = stage(n) + kLeftBytes;
    if (!kTurned) return right + maps::tile_offset<8>(col, k / 8);
    return right + col / 64 * kStep * maps::kRowBytes + maps::tile_offset<8>(k, col % 64 / 8);
  }

  // ---- for a consumer ----

  __device__ void wait_full(uint32_t n) const { device::wait(full(n), phase(n)); }
  __device__ void release(uint32_t n) const {
    __syncwarp();  // one lane speaks for all: they have read the stage's UpdateInfo
    if (threadIdx.x % 32 == 0) device::arrive(empty(n));
  }

  // acc += 64 rows times 2 kSums columns, from col0 of the tile on, of 16 of the step's sum.
  template <int kSums>
  __device__ void multiply(uint32_t n, int consumer, int col0, int k, float (&acc)[kSums]) const {
    const uint32_t begin = address + n % kStages * kStageBytes;
    const uint32_t left = begin + consumer * 64 * maps::kRowBytes;
    const uint32_t right = begin + kLeftBytes + col0 * maps::kRowBytes;
    static_assert(!kTurned || kStep == 64, "64 columns across the sum take as much as along it");
    device::multiply_tile<T, kTurned>(
        acc, maps::rows_descriptor(left) + k * maps::kNextInRows,
        kTurned ? maps::boxes_descriptor(right, kStep) + k * maps::kNextInBoxes
                : maps::rows_descriptor(right) + k * maps::kNextInRows);
  }
};

}  // namespace lora_kernels
