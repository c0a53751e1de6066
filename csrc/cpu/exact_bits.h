// The bits of a residual: indices of a vector's lanes, each as wide as its range, lowest bit first.
#pragma once

#include "exact_vec.h"

namespace lora_kernels {
namespace LK_ISA {

LK_INLINE int bit_width(uint32_t x) { return 63 - __builtin_clzll(2 * uint64_t{x} + 1); }

LK_INLINE uint64_t read_le64(const uint8_t* p) {
  uint64_t x = 0;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  std::memcpy(&x, p, 8);
#else
  for (int b = 0; b < 8; ++b) x |= static_cast<uint64_t>(p[b]) << (8 * b);
#endif
  return x;
}
LK_INLINE void write_le64(uint8_t* p, uint64_t x) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  std::memcpy(p, &x, 8);
#else
  for (int b = 0; b < 8; ++b) p[b] = static_cast<uint8_t>(x >> (8 * b));
#endif
}

// Up to 56 bits a time; 8 bytes beyond the end are touched.
struct BitWriter {
  uint8_t* out;
  uint64_t bits = 0;  // the lowest `held` of the next bytes
  int held = 0;
  LK_INLINE void put(uint64_t value, int width) {
    bits |= value << held;
    held += width;
    write_le64(out, bits);
    out += held >> 3;
    bits >>= held & ~7;
    held &= 7;
  }
};
struct BitReader {
  const uint8_t* data;
  uint64_t at = 0;
  LK_INLINE uint64_t take(int width) {
    const uint64_t word = read_le64(data + (at >> 3)) >> (at & 7);
    at += static_cast<uint64_t>(width);
    return word & ((uint64_t{1} << width) - 1);
  }
};

// The indices of a vector of the queue, in bit_width(range) bits each: as one word where they are
// few, else one by one.
LK_INLINE void put_lanes(BitWriter& to, iv index, uv range, uint32_t on) {
  uint32_t lane = 0;
#if defined(LK_PACKS_LANES)
  const iv set = lane_set(on), width = bit_widths(range) & set;
  if (__builtin_expect(lanes((iv)(range >> 24 != 0)) == 0, 1)) {
    for (int part = 0; part < kEights; ++part, lane += 8) {
      int total;
      const __m256i offset = lane_offsets(eight(width, part), &total);
      if (__builtin_expect(total > 56, 0)) break;
      to.put(pack_lanes(eight(index & set, part), offset), total);
    }
  }
#endif
  for (; on >> lane != 0; ++lane) {
    to.put(static_cast<uint32_t>(index[lane]), bit_width(range[lane]));
  }
}

// False where an index is not below or at its range; that of an empty interval is -1.
LK_INLINE bool take_lanes(BitReader& from, uv range, uint32_t on, iv* index) {
  uint32_t out[kN] = {}, lane = 0;
#if defined(LK_PACKS_LANES)
  const iv width = bit_widths(range) & lane_set(on);
  if (__builtin_expect(lanes((iv)(range >> 24 != 0)) == 0, 1)) {
    for (int part = 0; part < kEights; ++part, lane += 8) {
      int total;
      const __m256i wide = eight(width, part), offset = lane_offsets(wide, &total);
      if (__builtin_expect(total > 56, 0)) break;
      write(out + lane, unpack_lanes(from.take(total), wide, offset));
    }
  }
#endif
  bool fits = true;
  for (; on >> lane != 0; ++lane) {
    fits &= range[lane] != ~uint32_t{0};
    out[lane] = static_cast<uint32_t>(from.take(bit_width(range[lane])));
  }
  const uv found = read<uv>(out);
  *index = (iv)found;
  return fits && (lanes((iv)(found > range)) & on) == 0;
}

}  // namespace LK_ISA
}  // namespace lora_kernels
