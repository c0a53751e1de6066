// A block of an exact merge on CUDA: measured, then recorded and written.
#pragma once

#include "exact_block.h"

namespace lora_kernels {
namespace exact {

// Measures the block, or (job.write) records it and writes the merged weights.
template <class T>
__device__ void encode(const Job& job, const Place<T>& at, Shared& shared) {
  const uint32_t raw = static_cast<uint32_t>(at.count) * sizeof(T);
  const uint32_t max_words = (raw + 3) / 4;
  for (uint32_t i = threadIdx.x; i <= max_words; i += kThreads) shared.bytes[i] = 0;
  __syncthreads();

  // The interval of weight p where it has more than one key.
  const auto interval_of = [&](int p, uint32_t bits, bool* bad) {
    const float w = Number<T>::value(bits), acc = shared.update[spread(p)];
    const float u = __fadd_rn(w, acc);
    const uint32_t m = Number<T>::round(u);
    *bad = *bad || too_big<T>(u);
    Interval found = {0, 0};
    if (too_big<T>(u) || surely_unique<T>(w, Number<T>::value(m), acc, u)) {
      return found;
    }
    return interval<T>(key_of<T>(m), acc);
  };

  bool bad = false;
  const uint32_t all = lay_out(
      at.count, shared.warp_sum, &bad,
      [&](int p, bool* wrong) { return interval_of(p, at.bits(p), wrong); },
      [](uint32_t, uint32_t mine) { return mine > 0; },
      [&](int p, const Interval& found, uint32_t bit) {
        if (found.width() == 0) return;
        const uint32_t index =
            static_cast<uint32_t>(key_of<T>(at.bits(p))) - static_cast<uint32_t>(found.lo);
        const uint64_t placed = static_cast<uint64_t>(index) << (bit & 31);
        atomicOr(&shared.bytes[bit / 32], static_cast<uint32_t>(placed));
        if (placed >> 32) {
          atomicOr(&shared.bytes[bit / 32 + 1], static_cast<uint32_t>(placed >> 32));
        }
      });
  if (bad) note(job, at.block, kNotFinite);
  __syncthreads();
  uint32_t size = (all + 7) / 8;
  if (size >= raw) {
    // The weights themselves are not longer.
    size = raw;
    for (uint32_t i = threadIdx.x; i <= max_words; i += kThreads) shared.bytes[i] = 0;
    __syncthreads();
    for (int p = static_cast<int>(threadIdx.x); p < at.count; p += kThreads) {
      if constexpr (sizeof(T) == 4) {
        shared.bytes[p] = at.bits(p);
      } else {
        atomicOr(&shared.bytes[p / 2], at.bits(p) << (16 * (p % 2)));
      }
    }
  }
  __syncthreads();

  const auto merged_bits = [&](int p) {
    const float w = Number<T>::value(at.bits(p));
    return Number<T>::round(__fadd_rn(w, shared.update[spread(p)]));
  };
  if (job.write) {
    uint8_t* const body = job.args.body;
    if (body != nullptr) {
      uint8_t* const to = body + job.work.offset[at.block];
      for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
        to[i] = static_cast<uint8_t>(shared.bytes[i / 4] >> (8 * (i % 4)));
      }
      if (threadIdx.x == 0) {
        const uint32_t sum = job.work.sum[at.block];
        uint8_t* const table = body + 2 * job.at.blocks + 4 * at.block;
        for (int b = 0; b < 2; ++b) {
          body[2 * at.block + b] = static_cast<uint8_t>(size >> (8 * b));
        }
        for (int b = 0; b < 4; ++b) table[b] = static_cast<uint8_t>(sum >> (8 * b));
      }
    }
    for (int p = static_cast<int>(threadIdx.x); p < at.count; p += kThreads) {
      *at.at(p) = Number<T>::make(merged_bits(p));
    }
  } else {
    const uint32_t sum = checksum(at.block, at.count, (size + 3) / 4, shared.lane, merged_bits,
                                  [&](uint32_t i) { return shared.bytes[i]; });
    if (threadIdx.x == 0) {
      job.work.size[at.block] = size;
      job.work.sum[at.block] = sum;
    }
  }
}

}  // namespace exact
}  // namespace lora_kernels
