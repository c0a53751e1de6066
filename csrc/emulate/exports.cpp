// What the tests call beside the ops: the order of the threads, the index maps, the tile choice,
// and kernels that are wrong on purpose.
#include "../cuda/device.h"
#include "lora_kernels/cuda_tile.h"
#include "lora_kernels/mma_maps.h"

using namespace lora_kernels;

namespace {

// Copies a row to shared memory and reads it through ldmatrix, with what a kernel may forget.
enum class Forget { nothing, wait, barrier, second_barrier };

void faulty(const uint16_t* from, uint16_t* to, Forget forget) {
  uint8_t* const shared = device::dynamic_shared();
  for (int round = 0; round < 2; ++round) {
    device::async_copy_16(shared + threadIdx.x * 16, from, 16);
    device::async_commit();
    if (forget != Forget::wait) device::async_wait<0>();
    if (forget != Forget::barrier) __syncthreads();
    uint32_t v[4];
    device::load_matrices<false>(v, shared + (threadIdx.x * 16 + 512) % 1024);
    to[threadIdx.x] = static_cast<uint16_t>(v[0]);
    if (forget != Forget::second_barrier) __syncthreads();
  }
}

}  // namespace

extern "C" {

void lk_emulate_settings(unsigned seed, bool early) {
  lora_kernels_emulate::settings.seed = seed;
  lora_kernels_emulate::settings.early = early;
}

void lk_emulate_capability(int capability) {
  lora_kernels_emulate::settings.capability = capability;
}

void lk_emulate_capturing(bool capturing) { lora_kernels_emulate::settings.capturing = capturing; }

void lk_emulate_blocks(unsigned seed) { lora_kernels_emulate::settings.blocks = seed; }

const char* lk_emulate_faulty(int forget) {
  alignas(16) static const uint16_t from[8] = {};
  static uint16_t to[64];
  LK_LAUNCH(faulty, 1u, 64u, 1024, nullptr, from, to, static_cast<Forget>(forget));
  return lora_kernels_emulate::fault.c_str();
}

// out[lane * 10 ...]: accumulators' rows and columns (of 0 and 2), then row and run of the
// operands.
void lk_maps(int* out) {
  for (int lane = 0; lane < 32; ++lane, out += 10) {
    const int found[10] = {maps::acc_row(lane, 0), maps::acc_col(lane, 0), maps::acc_row(lane, 3),
                           maps::acc_col(lane, 3), maps::left_row(lane),   maps::left_run(lane),
                           maps::right_row(lane),  maps::right_run(lane),  maps::turned_row(lane),
                           maps::turned_run(lane)};
    for (int i = 0; i < 10; ++i) out[i] = found[i];
  }
}

int lk_tile_offset(int runs, int row, int run) {
  if (runs == 4) return maps::tile_offset<4>(row, run);
  return runs == 8 ? maps::tile_offset<8>(row, run) : maps::tile_offset<16>(row, run);
}

int lk_decode_parts(int64_t m, int64_t n, int64_t k, int sms, bool invariant) {
  return cuda_decode_parts(m, n, k, sms, invariant);
}

int lk_gradient_parts(int64_t m, int64_t r, int64_t cols, int sms) {
  return cuda_gradient_parts(m, r, cols, sms);
}

void lk_tile_at(int64_t index, int rows, int cols, int* out) {
  const maps::TileAt at = maps::tile_at(index, rows, cols);
  out[0] = at.row;
  out[1] = at.col;
}
}
