// The linear layer with its low-rank update in one product on the warpgroup units of sm_90a:
// y (m, n) = x W^T + bias + s * h B^T, h from shrink_kernel, rows with one adapter or their own.
//
// A block of three warpgroups goes through its tiles of 128 rows. The first, the producer, fills a
// ring of stages: x and W through the tensor memory accelerator, then h by its own stores beside a
// tile of B. The other two, 64 rows each, multiply what is there into sums in registers and free
// the stage, so that the copies of the next tile run during the epilogue. The update is the last
// steps of the same sum: r / k more of the base product, and y is written once. For dX the right
// operands lie across the sum (kTurned).
//
// Sums are in order and nothing is added by atomics: the same call gives the same bits.
// After the ladder of pranjalssh/fast.cu and DeepGEMM's split into warpgroups.
#pragma once

#include <array>
#include <type_traits>

#include "consume_sm90.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LK_EMULATE)
#define LK_SM90_CODE
#endif

namespace lora_kernels {
namespace {

template <class Ring>
__global__ void __launch_bounds__(Ring::kThreads, 1)
    linear_sm90_kernel(const __grid_constant__ Sm90Job job) {
#if defined(LK_SM90_CODE)
  __shared__ typename Ring::State state;
  __shared__ Sm90Slots slots;
  const Ring ring = Ring::start(&state);
  // Through a shuffle the compiler knows that it is one for the warp.
  const int group = static_cast<int>(__shfl_sync(0xffffffffu, threadIdx.x / 128, 0));
  // Of 168 a thread.
  if (group == 0) {
    device::give_registers<104>();
    Sm90Producer<Ring>{ring, job, slots}.run();
  } else {
    device::take_registers<200>();
    Sm90Consumer<Ring>{ring, job, group - 1}.run();
  }
#else
  __trap();  // not the code for this GPU (a driver told to compile the PTX): better than no y
#endif
}

// ---- the host's part ----

// A matrix for the copies, in boxes of 64 columns of memory. A thread's last maps are kept: those
// of a model's weights do not change.
template <class T>
const char* map_of(device::TensorMap* to, const CudaMatrix& from, int64_t rows, int64_t cols,
                   int box_rows) {
  struct Kept {
    std::array<int64_t, 5> of = {};
    device::TensorMap map;
  };
  constexpr size_t kKept = 256;
  thread_local std::array<Kept, kKept> all;
  const std::array<int64_t, 5> key = {reinterpret_cast<int64_t>(from.data), rows, cols, from.row,
                                      box_rows};
  uint64_t hash = 0;
  for (int64_t part : key) hash = (hash ^ static_cast<uint64_t>(part)) * 0x9e3779b97f4a7c15u;
  Kept& kept = all[hash >> 32 & (kKept - 1)];
  if (kept.of != key) {
    const char* const error = device::encode(&kept.map, from.data, rows, cols, from.row, box_rows,
                                             64, std::is_same<T, bf16>::value);
    if (error != nullptr) {
      kept.of = {};
      return error;
    }
    kept.of = key;
  }
  *to = kept.map;
  return nullptr;
}

template <class Ring>
const char* launch_sm90(const CudaLinear& args, int device, cudaStream_t stream) {
  using T = typename Ring::T;
  Sm90Job job = {};
  job.args = args;
  job.tiles_m = static_cast<int>((args.m + Ring::kRows - 1) / Ring::kRows);
  job.tiles_n = static_cast<int>((args.n + Ring::kCols - 1) / Ring::kCols);
  const auto right = [&](device::TensorMap* to, const CudaMatrix& from, int64_t cols, int64_t sum) {
    return Ring::kTurned ? map_of<T>(to, from, sum, cols, Ring::kStep)
                         : map_of<T>(to, from, cols, sum, Ring::kCols);
  };
  const char* error = map_of<T>(&job.x, args.x, args.m, args.k, Ring::kRows);
  if (error == nullptr) error = right(&job.weight, args.weight, args.n, args.k);
  // A bank is one matrix of all slots' columns where they are evenly apart.
  const int64_t slots = args.plan.row_order != nullptr ? args.plan.num_slots : 1;
  job.slot_rows = -1;
  if (args.r > 0 && fits_sm90(args.b, args.turned ? args.n : args.r)) {
    const int64_t apart = slots > 1 ? args.b_slot / args.b.row : 0;
    const int64_t rows = (slots - 1) * apart + args.n;
    if (apart * args.b.row == (slots > 1 ? args.b_slot : 0) && rows < int64_t{1} << 31) {
      job.slot_rows = apart;
      if (error == nullptr) error = right(&job.b, args.b, rows, args.r);
    }
  }
  if (error != nullptr) return error;
  int sms = 1;
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const int64_t tiles = int64_t{job.tiles_m} * job.tiles_n;
  static std::atomic<uint64_t> prepared{0};
  // The shrink is the launch before this one; with no rank there was none, and x may be being made.
  const cudaError_t launched =
      device::launch(linear_sm90_kernel<Ring>, static_cast<unsigned>(tiles < sms ? tiles : sms),
                     Ring::kThreads, Ring::kShared, stream, device, job, args.r > 0, prepared);
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

template <class T>
const char* run_sm90(const CudaLinear& args, int cols, int device, void* to) {
  const cudaStream_t stream = static_cast<cudaStream_t>(to);
  if (args.plan.row_order != nullptr) {
    return launch_sm90<Sm90Ring<T, 128, false, true>>(args, device, stream);
  }
  if (args.turned) {
    if (cols == 256) return launch_sm90<Sm90Ring<T, 256, true, false>>(args, device, stream);
    return launch_sm90<Sm90Ring<T, 128, true, false>>(args, device, stream);
  }
  if (cols == 256) return launch_sm90<Sm90Ring<T, 256, false, false>>(args, device, stream);
  return launch_sm90<Sm90Ring<T, 128, false, false>>(args, device, stream);
}

}  // namespace
}  // namespace lora_kernels
