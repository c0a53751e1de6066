// The gradients of lora_a and lora_b: skinny products with a long sum, over the rows of a batch.
//
// Both are u^T z, with u (m, r) float32 and z (m, cols) x or dy as it lies in memory: the turned
// right operand. u is turned, scaled and rounded on its way into shared memory. The sum is cut into
// parts, a block each; the last of a tile adds them in ascending order and rounds once.
#pragma once

#include "last_to_arrive.h"
#include "linear_sm80.h"

namespace lora_kernels {
namespace {

struct GradientJob {
  CudaGradient args;
  CudaOperand z;
  int64_t length;  // of a part, a multiple of kDepth
};

// Eight rows of a column of u, scaled and rounded; those from `live` on as zeros.
template <class T>
__device__ void copy_turned(uint8_t* to, const CudaGradient& args, int64_t offset, int live,
                            float scale) {
  float value[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) value[j] = j < live ? args.u[offset + j * args.r] : 0.f;
#pragma unroll 1
  for (int s = 1; s < args.splits; ++s) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < live) value[j] += args.u[s * args.u_split + offset + j * args.r];
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) device::write_2(to, j, from_float<T>(value[j] * scale).bits);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    gradient_kernel(const __grid_constant__ GradientJob job) {
  using T = typename Tile::T;
  const CudaGradient& args = job.args;
  const int part = blockIdx.z;
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * Tile::kRows;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * Tile::kCols;
  const int64_t begin = part * job.length;
  const int64_t end = begin + job.length < args.m ? begin + job.length : args.m;
  const float scale = *args.scaling;
  float acc[Tile::kMs][Tile::kNs][4] = {};
  Tile::pipeline(
      device::dynamic_shared(), end > begin ? tiles_of(end - begin) : 0,
      [&](int t, uint8_t* stage) {
        const int64_t at = begin + static_cast<int64_t>(t) * kDepth;
        Tile::copy_right(stage, job.z, col0, args.cols, at, end);
#pragma unroll
        for (int i = 0; i < Tile::kLeftRounds; ++i) {
          if (!Tile::has_left(i)) continue;
          // Neighbouring threads read neighbouring columns of u.
          const int row = Tile::left_run(i) % Tile::kRows, run = Tile::left_run(i) / Tile::kRows;
          const int64_t m = at + run * 8, left = row0 + row < args.r ? end - m : 0;
          copy_turned<T>(stage + maps::tile_offset<4>(row, run), args, m * args.r + row0 + row,
                         static_cast<int>(left < 8 ? left : 8), scale);
        }
      },
      [&](int, const uint8_t* stage) { Tile::step(stage, acc); });

  const int64_t plane = args.r * args.cols;
  Tile::for_each_pair(acc, [&](int r, int c, const float* value) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (row0 + r >= args.r || col0 + c + e >= args.cols) continue;
      args.partial[part * plane + (row0 + r) * args.cols + col0 + c + e] = value[e];
    }
  });
  if (!last_to_arrive(args.arrived + blockIdx.y * gridDim.x + blockIdx.x, args.parts)) return;
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kCols; i += Tile::kThreads) {
    const int64_t row = row0 + i / Tile::kCols, col = col0 + i % Tile::kCols;
    if (row >= args.r || col >= args.cols) continue;
    const float sum = sum_parts(args.partial + row * args.cols + col, args.parts, plane);
    static_cast<T*>(args.gradient)[row * args.row + col * args.col] = from_float<T>(sum);
  }
}

// ---- the host's part ----

template <class Tile>
void launch_gradient(const CudaGradient& args, cudaStream_t stream) {
  static_assert(Tile::kRows <= kGradientRows && Tile::kCols == 64, "tiles that `arrived` counts");
  const int64_t part = (args.m + args.parts - 1) / args.parts;
  const GradientJob job = {args, operand(args.z, 0), (part + kDepth - 1) / kDepth * kDepth};
  const dim3 grid = {static_cast<unsigned>((args.cols + Tile::kCols - 1) / Tile::kCols),
                     static_cast<unsigned>((args.r + Tile::kRows - 1) / Tile::kRows),
                     static_cast<unsigned>(args.parts)};
  if (grid.x == 0 || grid.y == 0) return;
  auto* const kernel = gradient_kernel<Tile>;
  LK_LAUNCH(kernel, grid, Tile::kThreads, Tile::kShared, stream, job);
}

template <class T>
void run_gradient(const CudaGradient& args, cudaStream_t stream) {
  if (args.r <= 16) return launch_gradient<GemmTile<T, 16, 64, 1, 4, true>>(args, stream);
  launch_gradient<GemmTile<T, 64, 64, 2, 2, true>>(args, stream);
}

}  // namespace
}  // namespace lora_kernels
