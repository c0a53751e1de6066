// A consumer of the sm_90a kernel: a warpgroup with 64 rows of a tile. It multiplies what the ring
// holds into sums in registers, then rounds them into y.
//
// The products of one step run while those of the next are issued. What is for all rows of a tile
// goes straight into the sums. An update for some rows only is multiplied some columns at a time
// into sums of its own, which are added to those rows, by selection: what is Inf or NaN in one
// adapter stays in its rows.
#pragma once

#include "produce_sm90.h"

namespace lora_kernels {

template <class Ring>
struct Sm90Consumer {
  using T = typename Ring::T;
  static constexpr int kCols = Ring::kCols;
  using Sums = float[kCols / 2];
  static constexpr int kPart = 64;

  const Ring& ring;
  const Sm90Job& job;
  const int consumer;

  __device__ void run() const {
    const CudaLinear& args = job.args;
    const int base = Ring::steps(args.k);
    uint32_t n = 0;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < job.tiles_m * job.tiles_n; tile += gridDim.x) {
      const maps::TileAt at = maps::tile_at(tile, job.tiles_m, job.tiles_n);
      const int64_t row0 = int64_t{at.row} * Ring::kRows + consumer * 64;
      Sums acc = {};
#pragma unroll 1
      for (int t = 0; t < base; ++t, ++n) {
        ring.wait_full(n);
        device::fence_products();
#pragma unroll
        for (int k = 0; k < Ring::kStep / 16; ++k) ring.multiply(n, consumer, 0, k, acc);
        device::commit_products();
        device::wait_products<1>();
        if (t > 0) ring.release(n - 1);
      }
      device::wait_products<0>();
      ring.release(n - 1);
      if (args.r > 0) n = updates(n, row0, acc);
      store(args, row0, int64_t{at.col} * kCols, acc);
    }
  }

  // The tile's updates; the next step.
  __device__ uint32_t updates(uint32_t n, int64_t row0, Sums& acc) const {
    if (Ring::kMulti) device::wait_for_launch_before();  // row_slots are the shrink's
    for (bool last = false; !last; ++n) {
      ring.wait_full(n);
      const UpdateInfo info = ring.update(n);
      last = info.last;
      if (!Ring::kMulti || info.slot < 0) {
        multiply(n, 0, info.steps, acc);
      } else {
        const bool mine[2] = {is_of(info.slot, row0, 0), is_of(info.slot, row0, 2)};
#pragma unroll
        for (int col = 0; col < kCols; col += kPart) {
          float part[kPart / 2] = {};
          multiply(n, col, info.steps, part);
#pragma unroll
          for (int i = 0; i < kPart / 2; ++i) {
            if (mine[i / 2 % 2]) acc[col / 2 + i] += part[i];
          }
        }
      }
      ring.release(n);
    }
    return n;
  }

  // acc += the first steps of 16 of a stage.
  template <int kSums>
  __device__ void multiply(uint32_t n, int col0, int steps, float (&acc)[kSums]) const {
#pragma unroll 1
    for (int k = 0; k < steps; ++k) {
      device::fence_products();
      ring.multiply(n, consumer, col0, k, acc);
      device::commit_products();
      device::wait_products<0>();
    }
  }

  // Whether the row of this thread's sum i is of a slot.
  __device__ bool is_of(int slot, int64_t row0, int i) const {
    const int64_t row = row0 + maps::sum_row(static_cast<int>(threadIdx.x) % 128, i);
    return row < job.args.m && job.args.plan.row_slots[row] == slot;
  }

  // Four lanes hold two columns each of a row's blocks of eight; they trade, so that each stores
  // one whole block of four.
  static __device__ void trade(uint32_t (&words)[4]) {
    const bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
    const uint32_t a = __shfl_xor_sync(0xffffffffu, high ? words[0] : words[2], 2);
    const uint32_t b = __shfl_xor_sync(0xffffffffu, high ? words[1] : words[3], 2);
    // Blocks 0 and 1 (2 and 3 for the high lanes), pairs 0 and 1 from the low lanes.
    const uint32_t mine0 = high ? words[2] : words[0], mine1 = high ? words[3] : words[1];
    const uint32_t c = __shfl_xor_sync(0xffffffffu, odd ? mine0 : mine1, 1);
    const uint32_t d = __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
    const uint32_t kept = odd ? mine1 : mine0, got = odd ? b : a;
    // By lanes of two: pairs of this half, then of the other.
    const uint32_t near[2] = {odd ? c : kept, odd ? kept : c};
    const uint32_t far[2] = {odd ? d : got, odd ? got : d};
    words[0] = high ? far[0] : near[0];
    words[1] = high ? far[1] : near[1];
    words[2] = high ? near[0] : far[0];
    words[3] = high ? near[1] : far[1];
  }

  // y of this consumer's rows, rounded once.
  static __device__ void store(const CudaLinear& args, int64_t row0, int64_t col0, Sums& acc) {
    const T* const bias = static_cast<const T*>(args.bias);
    const int thread = static_cast<int>(threadIdx.x) % 128;
#pragma unroll
    for (int i = 0; i < kCols / 2; i += 16) {  // four blocks of eight columns
      float add[8] = {};
      if (bias != nullptr) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int64_t col = col0 + maps::sum_col(thread, i + j / 2 * 4 + j % 2);
          if (col < args.n) add[j] = device::to_float(bias[col * args.bias_stride]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int block = 0; block < 4; ++block) {
          const float* const sum = acc + i + block * 4 + half * 2;
          words[block] =
              static_cast<uint32_t>(device::from_float<T>(sum[0] + add[block * 2]).bits) |
              static_cast<uint32_t>(device::from_float<T>(sum[1] + add[block * 2 + 1]).bits) << 16;
        }
        trade(words);
        const int64_t row = row0 + maps::sum_row(thread, half * 2);
        const int64_t col = col0 + (i / 4 + thread % 4) * 8;
        if (row < args.m && col < args.n) {
          device::store_global_16(static_cast<T*>(args.y) + row * args.y_row + col, words);
        }
      }
    }
  }
};

}  // namespace lora_kernels
