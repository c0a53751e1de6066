// A block of an exact merge undone on CUDA: checked, then restored.
#pragma once

#include "exact_block.h"

namespace lora_kernels {
namespace exact {

// Checks the block against its bytes, or (job.write) restores the weights.
template <class T>
__device__ void decode(const Job& job, const Place<T>& at, Shared& shared) {
  const uint8_t* const bytes = job.args.body + job.work.offset[at.block];
  const uint32_t size = job.work.size[at.block];
  if (!job.write) {
    const auto word = [&](uint32_t i) {
      uint32_t v = 0;
      for (uint32_t b = 0; b < 4; ++b) {
        if (4 * i + b < size) v |= static_cast<uint32_t>(bytes[4 * i + b]) << (8 * b);
      }
      return v;
    };
    const uint32_t sum = checksum(
        at.block, at.count, (size + 3) / 4, shared.lane, [&](int p) { return at.bits(p); }, word);
    if (threadIdx.x == 0 && sum != job.work.sum[at.block]) note(job, at.block, kMismatch);
  }

  const bool raw = size == static_cast<uint32_t>(at.count) * sizeof(T);
  if (raw) {
    for (int p = static_cast<int>(threadIdx.x); p < at.count; p += kThreads) {
      uint32_t w = 0;
      for (uint32_t b = 0; b < sizeof(T); ++b) {
        w |= static_cast<uint32_t>(bytes[p * sizeof(T) + b]) << (8 * b);
      }
      if (job.write) {
        *at.at(p) = Number<T>::make(w);
      } else {
        const int32_t m = merged<T>(key_of<T>(w), shared.update[spread(p)]);
        if (m != key_of<T>(at.bits(p))) note(job, at.block, kMismatch);
      }
    }
    return;
  }

  // The interval of the weight that merged to m, or the one key that is surely it.
  const auto interval_of = [&](int p, uint32_t m) {
    const float value = Number<T>::value(m), acc = shared.update[spread(p)];
    const uint32_t guess = Number<T>::round(__fadd_rn(value, -acc));
    const float w = Number<T>::value(guess);
    if (surely_unique<T>(w, value, acc, __fadd_rn(w, acc))) {
      const int32_t key = key_of<T>(guess);
      return Interval{key, key};
    }
    return interval<T>(key_of<T>(m), acc);
  };
  bool bad = false;
  const uint32_t all = lay_out(
      at.count, shared.warp_sum, &bad, [&](int p, bool*) { return interval_of(p, at.bits(p)); },
      [&](uint32_t bit, uint32_t mine) {
        bad = bad || bit + mine > size * 8;
        return !bad;
      },
      [&](int p, const Interval& found, uint32_t bit) {
        const int width = found.width();
        uint64_t window = 0;
        for (uint32_t b = 0; 8 * b < (bit & 7) + static_cast<uint32_t>(width); ++b) {
          window |= static_cast<uint64_t>(bytes[bit / 8 + b]) << (8 * b);
        }
        const uint32_t index =
            static_cast<uint32_t>(window >> (bit & 7) & ((uint64_t{1} << width) - 1));
        const int64_t key = int64_t{found.lo} + index;
        bad = bad || index > found.range() || key <= -int64_t{Number<T>::kInf} - 1 ||
              key >= Number<T>::kInf;
        if (job.write) {
          *at.at(p) = Number<T>::make(bits_of<T>(static_cast<int32_t>(key)));
        }
      });
  if (bad || (threadIdx.x == 0 && (all + 7) / 8 != size)) note(job, at.block, kMismatch);
}

}  // namespace exact
}  // namespace lora_kernels
