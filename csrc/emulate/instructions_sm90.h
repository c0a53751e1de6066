// The instructions of csrc/cuda/device_sm90.h on the host, written from their definition in the PTX
// ISA (9.7.15.5.1: wgmma's fragments and shared-memory layouts; 5.5.4: swizzle of tensor copies),
// not from the kernels' own index maps.
//
// Copies land at once and products are computed at the last moment allowed (`early`), or the other
// way round: a stage that is freed before its products are done, or read before its copies are, is
// wrong under one of them.
#pragma once

#include <atomic>

#include "instructions.h"

namespace lora_kernels {
namespace device {

using lora_kernels_emulate::block;
using lora_kernels_emulate::fail;
using lora_kernels_emulate::Mbarrier;
using lora_kernels_emulate::Meeting;
using lora_kernels_emulate::self;
using lora_kernels_emulate::settings;

// An address of shared memory: it begins anywhere, as on a device.
inline uint32_t shared_begin() {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(block->shared.data()) % 1024);
}
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - block->shared.data()) +
         shared_begin();
}
inline uint8_t* at_shared(uint32_t address) {
  const uint32_t offset = address - shared_begin();
  if (offset >= block->shared.size()) fail("shared memory: out of bounds");
  return block->shared.data() + offset;
}
// The 128-byte swizzle: bits 4 to 6 of an address by its bits 7 to 9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline Mbarrier& barrier_at(const void* barrier) {
  const auto found = block->async.barriers.find(barrier);
  if (found == block->async.barriers.end()) fail("mbarrier: not initialised");
  return found->second;
}
inline void barrier_init(uint64_t* barrier, int arrivals) {
  Mbarrier fresh;
  fresh.expected = fresh.pending = arrivals;
  block->async.barriers[barrier] = fresh;
}
inline void fence_barriers() {}
inline void arrive_expect(uint64_t* barrier, uint32_t bytes) {
  Mbarrier& b = barrier_at(barrier);
  if (b.pending == 0) fail("mbarrier: one arrival too many");
  b.bytes += bytes;
  --b.pending;
  b.settle();
}
inline void arrive(uint64_t* barrier) { arrive_expect(barrier, 0); }
inline void wait(uint64_t* barrier, uint32_t parity) {
  const Mbarrier& b = barrier_at(barrier);
  while (b.phase % 2 == parity) lora_kernels_emulate::wait_for(&b.phase, b.phase);
}
inline void sync_some(int barrier, int threads) {
  Meeting& m = block->async.meetings[barrier];
  const unsigned seen = m.generation;
  if (++m.arrived == threads) {
    m.arrived = 0;
    ++m.generation;
  } else {
    lora_kernels_emulate::wait_for(&m.generation, seen);
  }
}

struct TensorMap {
  const uint8_t* data;
  int64_t rows, cols, row_bytes;
  int box_rows, box_cols;
};
inline const char* encode(TensorMap* map, const void* data, int64_t rows, int64_t cols,
                          int64_t row_stride, int box_rows, int box_cols, bool) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || row_stride % 8 != 0 || row_stride < cols ||
      rows < 1 || cols < 1 || box_rows > 256 || box_cols != 64) {
    return "cuTensorMapEncodeTiled refused an operand";
  }
  *map = {static_cast<const uint8_t*>(data), rows, cols, row_stride * 2, box_rows, box_cols};
  return nullptr;
}
inline void load_tile(void* to, const TensorMap* map, uint64_t* barrier, int row, int col) {
  const uint32_t begin = shared_address(to);
  if (begin % 128 != 0) fail("tensor copy: not aligned to 128 bytes");
  const TensorMap from = *map;
  const auto land = [=] {
    for (int i = 0; i < from.box_rows; ++i) {
      for (int j = 0; j < from.box_cols; ++j) {
        const bool inside = row + i < from.rows && col + j < from.cols;
        const uint32_t address = swizzled(begin + static_cast<uint32_t>(i * 128 + j * 2));
        const uint8_t zeros[2] = {0, 0};
        std::memcpy(at_shared(address),
                    inside ? from.data + (row + i) * from.row_bytes + (col + j) * 2 : zeros, 2);
      }
    }
    Mbarrier& b = barrier_at(barrier);
    b.bytes -= from.box_rows * from.box_cols * 2;
    b.settle();
  };
  if (settings.early) {
    land();
  } else {
    block->async.landing.push_back(land);
  }
}

inline void store_16(void* to, const uint32_t (&words)[4]) {
  std::memcpy(to, words, 16);
  lora_kernels_emulate::piece(to);
  block->async.unfenced[reinterpret_cast<uintptr_t>(to)] = block->current;
}
inline void store_global_16(void* to, const uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fail("st.global.v4: not aligned to 16 bytes");
  std::memcpy(to, words, 16);
}
inline void fence_async() {
  auto& unfenced = block->async.unfenced;
  for (auto it = unfenced.begin(); it != unfenced.end();) {
    it = it->second == block->current ? unfenced.erase(it) : std::next(it);
  }
}

template <int kCount>
void take_registers() {}
template <int kCount>
void give_registers() {}
inline bool may_start_early = false;
inline void wait_for_launch_before() {
  if (!may_start_early) fail("griddepcontrol.wait: this launch waits for nothing");
}

inline void fence_products() {}
inline void commit_products() {
  self().products.groups.push_back(self().products.open);
  self().products.open.clear();
}
template <int kLeft>
void wait_products() {
  auto& groups = self().products.groups;
  while (groups.size() > kLeft) {
    for (const auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
  // ".sync.aligned": the lanes of a warp go on together.
  lora_kernels_emulate::collective(nullptr, 0, [](lora_kernels_emulate::Warp&) {});
}

// An element of an operand that lies in shared memory as its descriptor says: `i` across the sum.
template <class T>
float operand_at(uint64_t descriptor, bool turned, int i, int k) {
  const auto field = [descriptor](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
  };
  if (descriptor >> 62 != 1) fail("wgmma: expected a swizzle of 128 bytes");
  const uint32_t leading = field(16), stride = field(32);
  const uint32_t row = static_cast<uint32_t>(turned ? k : i);
  const uint32_t in_row = static_cast<uint32_t>(turned ? i % 64 : k);
  const uint32_t address = field(0) + row / 8 * stride + row % 8 * 128 + in_row * 2 +
                           (turned ? static_cast<uint32_t>(i / 64) * leading : 0);
  const uint8_t* const p = at_shared(swizzled(address));
  if (!block->async.unfenced.empty()) {
    const uintptr_t piece = reinterpret_cast<uintptr_t>(p) / 16 * 16;
    if (block->async.unfenced.count(piece) != 0) {
      fail("race: a product reads what was stored, with no fence.proxy.async between");
    }
  }
  T x;
  std::memcpy(&x.bits, p, 2);
  return to_float(x);
}

template <class T, bool kTurned, int kSums>
void multiply_tile(float (&acc)[kSums], uint64_t left, uint64_t right) {
  float* const sums = acc;
  const int lane = static_cast<int>(block->current % 32);
  const int warp = static_cast<int>(block->current / 32 % 4);
  const auto product = [=] {
    float rows[2][16];
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 16; ++k) {
        rows[half][k] = operand_at<T>(left, false, warp * 16 + lane / 4 + half * 8, k);
      }
    }
    for (int i = 0; i < kSums; i += 4) {
      for (int e = 0; e < 2; ++e) {
        double sum[2] = {static_cast<double>(sums[i + e]), static_cast<double>(sums[i + e + 2])};
        for (int k = 0; k < 16; ++k) {
          const double x = operand_at<T>(right, kTurned, i / 4 * 8 + lane % 4 * 2 + e, k);
          for (int half = 0; half < 2; ++half) {
            sum[half] += static_cast<double>(rows[half][k]) * x;
          }
        }
        sums[i + e] = static_cast<float>(sum[0]);
        sums[i + e + 2] = static_cast<float>(sum[1]);
      }
    }
  };
  if (settings.early) {
    self().products.open.push_back(product);
  } else {
    product();
  }
}

template <class Job>
cudaError_t launch(void (*kernel)(const Job), unsigned grid, unsigned threads, size_t shared,
                   cudaStream_t, int, const Job& job, bool early, std::atomic<uint64_t>&) {
  ++lora_kernels_emulate::sm90_launches;
  may_start_early = early;
  LK_LAUNCH(kernel, grid, threads, shared, nullptr, job);
  return cudaGetLastError();
}

}  // namespace device
}  // namespace lora_kernels
