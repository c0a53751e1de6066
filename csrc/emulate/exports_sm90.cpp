// What the tests of the sm_90a kernel call beside the ops: its choice and index maps, how often it
// ran, and a kernel that is wrong on purpose.
#include "../cuda/device_sm90.h"
#include "lora_kernels/cuda_sm90.h"

using namespace lora_kernels;

namespace {

enum class Forget { nothing, fence, full, empty, products, arrival };

// Two products of ones over one stage, by a producer (thread 0 copies, or stores by itself) and a
// warpgroup, with what a kernel may forget; `y` gets the sum of the first thread.
void faulty(const device::TensorMap map, float* y, Forget forget) {
  static uint64_t full, empty;
  const uint32_t past = device::shared_address(device::dynamic_shared()) % 1024;
  uint8_t* const stage = device::dynamic_shared() + (1024 - past) % 1024;
  if (threadIdx.x == 0) {
    device::barrier_init(&full, 1);
    device::barrier_init(&empty, 4);
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    for (uint32_t n = 0; threadIdx.x == 128 && n < 2; ++n) {
      if (forget != Forget::empty) device::wait(&empty, n % 2 ^ 1);
      device::arrive_expect(&full, 64 * 128 * (forget == Forget::arrival ? 2 : 1));
      device::load_tile(stage, &map, &full, static_cast<int>(n) * 64, 0);
    }
    return;
  }
  float acc[32] = {};
  for (uint32_t n = 0; n < 2; ++n) {
    if (forget != Forget::full) device::wait(&full, n % 2);
    if (forget == Forget::fence) {
      const uint32_t ones[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
      device::store_16(stage + threadIdx.x * 16, ones);
    }
    const uint64_t at = maps::rows_descriptor(device::shared_address(stage));
    device::fence_products();
    device::multiply_tile<f16, false>(acc, at, at);
    device::commit_products();
    if (forget != Forget::products) device::wait_products<0>();
    if (threadIdx.x % 32 == 0) device::arrive(&empty);
  }
  device::wait_products<0>();
  if (threadIdx.x == 0) *y = acc[0];
}

}  // namespace

extern "C" {

int lk_sm90_cols(int64_t m, int64_t n, int64_t k, int64_t r, int sms) {
  return cuda_sm90_cols(m, n, k, r, sms);
}

int lk_emulate_sm90_launches() { return lora_kernels_emulate::sm90_launches; }

// Empty, or what was found: a fault's message, or that the sum is wrong.
const char* lk_emulate_faulty_sm90(int forget) {
  // Rows of ones, then of twos: 16 + 64 of the sum of squares.
  alignas(16) static uint16_t rows[128][64];
  for (int i = 0; i < 128; ++i) {
    for (uint16_t& x : rows[i]) x = i < 64 ? 0x3c00 : 0x4000;
  }
  device::TensorMap map;
  device::encode(&map, rows, 128, 64, 64, 64, 64, false);
  float y = 0;
  LK_LAUNCH(faulty, 1u, 160u, 64 * 128 + 1024, nullptr, map, &y, static_cast<Forget>(forget));
  if (!lora_kernels_emulate::fault.empty()) return lora_kernels_emulate::fault.c_str();
  return y == 80 ? "" : "a wrong sum";
}

// sum_row and sum_col of each thread's first `count` sums.
void lk_sum_maps(int count, int* out) {
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < count; ++i) {
      *out++ = maps::sum_row(thread, i);
      *out++ = maps::sum_col(thread, i);
    }
  }
}

uint64_t lk_descriptor(uint32_t address, int depth) {
  return depth == 0 ? maps::rows_descriptor(address) : maps::boxes_descriptor(address, depth);
}
}
