// One number at a time: bits of a float32, and bit-exact conversions of float16 and bfloat16, for
// tails, the portable path and the emulation of CUDA. Included by files that are compiled once per
// instruction set: everything is inlined, so that no function of one is linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#include "lora_kernels/cpu.h"

#define LK_INLINE inline __attribute__((always_inline))

namespace lora_kernels {

LK_INLINE int clip(int64_t n, int64_t most) { return static_cast<int>(n < most ? n : most); }

LK_INLINE uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
LK_INLINE float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// The first n bits at p, n <= 32.
LK_INLINE uint32_t load_bits(const uint8_t* p, int n) {
  uint32_t bits = 0;
  if (n == 32) {
    std::memcpy(&bits, p, 4);
  } else if (n == 16) {
    std::memcpy(&bits, p, 2);
  } else {
    for (int i = 0; i < (n + 7) / 8; i++) bits |= static_cast<uint32_t>(p[i]) << (8 * i);
  }
  return bits;
}

LK_INLINE float to_float(float x) { return x; }
LK_INLINE float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
LK_INLINE float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t body = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // Exponent 31 is Inf or NaN; a subnormal half is an ordinary float after the scaling.
  if (body >= 0x0f800000u) return bits_float(sign | 0x7f800000u | body);
  return bits_float(sign | float_bits(bits_float(body) * 0x1p112f));
}

template <class T>
T from_float(float x);
template <>
LK_INLINE float from_float<float>(float x) {
  return x;
}
template <>
LK_INLINE bf16 from_float<bf16>(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
LK_INLINE f16 from_float<f16>(float x) {
  const uint32_t u = float_bits(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t mag = u & 0x7fffffffu;
  uint32_t h;
  if (mag > 0x7f800000u) {
    h = 0x7e00u | ((mag >> 13) & 0x3ffu);
  } else if (mag >= 0x477ff000u) {
    h = 0x7c00u;
  } else if (mag < 0x38800000u) {
    // Adding 0.5 aligns the mantissa so that the adder itself rounds to a multiple of 2^-24.
    h = float_bits(bits_float(mag) + 0.5f) - 0x3f000000u;
  } else {
    h = (mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | h)};
}

}  // namespace lora_kernels
