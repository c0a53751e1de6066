// Philox4x32-10 (Salmon et al., SC'11), one counter at a time: the scalar statement of the dropout
// draw.
//
// Ten rounds of two 32 x 32 -> 64 bit products, with a key that advances by a Weyl constant a
// round. The dropout mask asks for one call per group of eight columns: the group's number is the
// low 64 bits of the counter, the seed is the key, and the four words are eight 16-bit draws.
#pragma once

#include <cstdint>

namespace lora_kernels {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// w[0..3] = Philox4x32-10(counter = (lo, hi, 0, 0) of `counter`, key = (lo, hi) of `key`).
// Internal linkage: included by files that are compiled once per instruction set.
static inline void philox(uint64_t counter, uint64_t key, uint32_t w[4]) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
}

}  // namespace lora_kernels
