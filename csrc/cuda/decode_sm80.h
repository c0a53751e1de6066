// The linear layer for up to 64 rows: what its time goes to is reading the weight.
//
// Operands are swapped: outputs are the rows of a tile, the tokens, 16, 32 or 64, its columns, so
// that one token costs what 16 do. The sum over x and W is cut into parts, a block each, so that
// every multiprocessor streams its share of the weight with many copies under way. A block leaves
// its part in float32; the last of a tile to arrive adds the parts in ascending order, then the
// update and the bias, and rounds once: which one is last does not matter.
//
// The update s * h B^T has a sum of its own. Slots are dealt out over the parts; a token is of one
// slot, so one block writes its update, and only that: what is Inf or NaN in one adapter stays in
// its tokens, and those of the base alone take none.
#pragma once

#include "last_to_arrive.h"
#include "linear_sm80.h"

namespace lora_kernels {
namespace {

struct DecodeJob {
  CudaDecode args;
  CudaOperand x, weight, b;
  int tiles;
  int64_t length;  // of a part, a multiple of kDepth
};

// Where tokens lie in the plan, and the slots whose update a block computes.
struct DecodeSlots {
  int count, slot[64], place[64];

  __device__ void find(const CudaPlan& plan, int64_t m, int part, int parts) {
    if (threadIdx.x < 64) place[threadIdx.x] = -1;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    const int live = plan.segment_starts[plan.num_slots + 1];
    for (int p = static_cast<int>(threadIdx.x); p < live; p += blockDim.x) {
      const int row = plan.row_order[p];
      if (row >= 0 && row < m) place[row] = p;
    }
    for (int s = part + parts * static_cast<int>(threadIdx.x); s < plan.num_slots;
         s += parts * static_cast<int>(blockDim.x)) {
      if (plan.segment_starts[s + 1] == plan.segment_starts[s + 2]) continue;
      const int at = atomicAdd(&count, 1);
      if (at < 64) slot[at] = s;
    }
    __syncthreads();
  }
  __device__ bool has(const CudaPlan& plan, int64_t token, int s) const {
    return place[token] >= plan.segment_starts[s + 1] && place[token] < plan.segment_starts[s + 2];
  }
};

// Blocks on a multiprocessor: with 64 tokens the sums take the registers of a fourth.
template <class Tile>
constexpr int kDecodeResident = Tile::kCols == 64 ? 3 : 4;

template <class Tile, bool kMulti>
__global__ void __launch_bounds__(Tile::kThreads, kDecodeResident<Tile>)
    decode_kernel(const __grid_constant__ DecodeJob job) {
  using T = typename Tile::T;
  const CudaLinear& args = job.args.linear;
  const int parts = job.args.parts;
  const int tile = static_cast<int>(blockIdx.x) % job.tiles;
  const int part = static_cast<int>(blockIdx.x) / job.tiles;
  const int64_t out0 = static_cast<int64_t>(tile) * Tile::kRows;
  const int64_t width = static_cast<int64_t>(job.tiles) * Tile::kRows;
  DecodeSlots* slots = nullptr;
  if constexpr (kMulti) {
    __shared__ DecodeSlots found;
    slots = &found;
    slots->find(args.plan, args.m, part, parts);
  }

  const int64_t begin = part * job.length;
  const int64_t end = begin + job.length < args.k ? begin + job.length : args.k;
  const int base = end > begin ? tiles_of(end - begin) : 0, by_slot = tiles_of(args.r);
  int updates = part == 0 && args.r > 0;
  if constexpr (kMulti) updates = args.r == 0 ? 0 : slots->count < 64 ? slots->count : 64;
  const auto slot_of = [&](int update) { return kMulti ? slots->slot[update] : 0; };

  float acc[Tile::kMs][Tile::kNs][4] = {};
  const auto copy_rows = [&](uint8_t* stage, const CudaOperand& from, int64_t at, int64_t stop) {
    int64_t offset[Tile::kLeftRounds];
#pragma unroll
    for (int i = 0; i < Tile::kLeftRounds; ++i) {
      const int64_t out = out0 + Tile::left_run(i) / 4;
      offset[i] = out < args.n ? out * from.row : -1;
    }
    Tile::template copy_left<true>(stage, from, offset, at, stop);
  };
  const auto copy = [&](int t, uint8_t* stage) {
    if (t < base) {
      const int64_t at = begin + static_cast<int64_t>(t) * kDepth;
      copy_rows(stage, job.weight, at, end);
      Tile::copy_right(stage, job.x, 0, args.m, at, end);
      return;
    }
    const int slot = slot_of((t - base) / by_slot);
    const int64_t at = static_cast<int64_t>((t - base) % by_slot) * kDepth;
    const int64_t rank =
        kMulti && args.plan.slot_ranks != nullptr ? args.plan.slot_ranks[slot] : args.r;
    CudaOperand b = job.b;
    b.data = static_cast<const T*>(b.data) + slot * args.b_slot;
    copy_rows(stage, b, at, rank);
    const float scale = args.scaling[slot * args.scaling_stride];
#pragma unroll
    for (int i = 0; i < Tile::kRightRounds; ++i) {
      const int index = i * Tile::kThreads + static_cast<int>(threadIdx.x);
      if (index >= Tile::kCols * 4) continue;
      const int token = index / 4, run = index % 4;
      bool mine = token < args.m;
      if constexpr (kMulti) mine = mine && slots->has(args.plan, token, slot);
      const int64_t k = at + run * 8, left = mine ? rank - k : 0;
      copy_h<T>(stage + Tile::kLeftBytes + maps::tile_offset<4>(token, run), args,
                token * args.h_row + k, static_cast<int>(left < 8 ? left : 8), scale);
    }
  };
  // What was summed before update `next` began: the part, or the update before.
  const auto leave = [&](int next) {
    const int64_t plane = next == 0 ? part : parts;
    Tile::for_each_pair(acc, [&](int out, int token, const float* value) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (token + e >= args.m) continue;
        if constexpr (kMulti) {
          if (next > 0 && !slots->has(args.plan, token + e, slot_of(next - 1))) continue;
        }
        job.args.partial[(plane * args.m + token + e) * width + out0 + out] = value[e];
      }
    });
  };
  Tile::pipeline(device::dynamic_shared(), base + by_slot * updates, copy,
                 [&](int t, const uint8_t* stage) {
                   if (t >= base && (t - base) % by_slot == 0) {
                     leave((t - base) / by_slot);
#pragma unroll
                     for (int j = 0; j < Tile::kNs; ++j) {
#pragma unroll
                       for (int e = 0; e < 4; ++e) acc[0][j][e] = 0.f;
                     }
                   }
                   Tile::step(stage, acc);
                 });
  leave(updates);

  if (!last_to_arrive(job.args.arrived + tile, parts)) return;
  const T* const bias = static_cast<const T*>(args.bias);
  for (int i = static_cast<int>(threadIdx.x); i < args.m * Tile::kRows; i += Tile::kThreads) {
    const int64_t token = i / Tile::kRows, out = out0 + i % Tile::kRows;
    if (out >= args.n) continue;
    const float* const from = job.args.partial + token * width + out;
    float v = sum_parts(from, parts, args.m * width);
    bool updated = args.r > 0;
    if constexpr (kMulti) updated = updated && slots->place[token] >= args.plan.segment_starts[1];
    if (updated) v += __ldcg(from + parts * args.m * width);
    if (bias != nullptr) v += to_float(bias[out * args.bias_stride]);
    static_cast<T*>(args.y)[token * args.y_row + out * args.y_col] = from_float<T>(v);
  }
}

// ---- the host's part ----

template <class Tile, bool kMulti>
void launch_decode(const CudaDecode& args, cudaStream_t stream) {
  static_assert(Tile::kRows == kDecodeCols && Tile::kMs == 1, "outputs of a tile, 16 a warp");
  const CudaLinear& linear = args.linear;
  const int64_t part = (linear.k + args.parts - 1) / args.parts;
  const DecodeJob job = {args,
                         operand(linear.x, 0),
                         operand(linear.weight, 0),
                         operand(linear.b, linear.b_slot),
                         static_cast<int>((linear.n + Tile::kRows - 1) / Tile::kRows),
                         (part + kDepth - 1) / kDepth * kDepth};
  auto* const kernel = decode_kernel<Tile, kMulti>;
  LK_LAUNCH(kernel, static_cast<unsigned>(job.tiles * args.parts), Tile::kThreads, Tile::kShared,
            stream, job);
}

template <class T, bool kMulti>
void run_decode(const CudaDecode& args, cudaStream_t stream) {
  const int64_t m = args.linear.m;
  if (m <= 16) return launch_decode<GemmTile<T, 64, 16, 4, 1, false, 8>, kMulti>(args, stream);
  if (m <= 32) return launch_decode<GemmTile<T, 64, 32, 4, 1, false, 7>, kMulti>(args, stream);
  launch_decode<GemmTile<T, 64, 64, 4, 1, false, 5>, kMulti>(args, stream);
}

}  // namespace
}  // namespace lora_kernels
