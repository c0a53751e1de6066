// The tile instructions of lora_kernels/tiles.h in plain C++, for tests on a CPU without them. The
// dot product is that of Intel's manual: even and odd numbers of a row have sums of their own,
// which are added to one another and then to the destination; subnormals count as zero.
#pragma once

namespace lora_kernels {
namespace LK_ISA {

struct Tiles {
  Tiles() {}  // not trivial: an object of it is no unused variable
};

inline thread_local uint8_t emulated_tiles[8][16][64];

template <int T>
void tile_zero() {
  std::memset(emulated_tiles[T], 0, sizeof emulated_tiles[T]);
}
template <int T>
void tile_load(const void* p, int64_t stride) {
  for (int i = 0; i < 16; i++) {
    std::memcpy(emulated_tiles[T][i], static_cast<const char*>(p) + i * stride, 64);
  }
}
template <int T>
void tile_store(void* p, int64_t stride) {
  for (int i = 0; i < 16; i++) {
    std::memcpy(static_cast<char*>(p) + i * stride, emulated_tiles[T][i], 64);
  }
}

inline float no_subnormal(float x) {
  return (float_bits(x) & 0x7f800000u) == 0 ? bits_float(float_bits(x) & 0x80000000u) : x;
}

template <int C, int A, int B>
void tile_dot() {
  for (int m = 0; m < 16; m++) {
    bf16 a[32];
    float c[16];
    std::memcpy(a, emulated_tiles[A][m], 64);
    std::memcpy(c, emulated_tiles[C][m], 64);
    for (int n = 0; n < 16; n++) {
      float sums[2] = {};
      for (int k = 0; k < 32; k++) {
        bf16 b;
        std::memcpy(&b, emulated_tiles[B][k / 2] + 4 * n + 2 * (k % 2), 2);
        sums[k % 2] = no_subnormal(
            std::fma(no_subnormal(to_float(a[k])), no_subnormal(to_float(b)), sums[k % 2]));
      }
      c[n] = no_subnormal(no_subnormal(c[n]) + no_subnormal(sums[0] + sums[1]));
    }
    std::memcpy(emulated_tiles[C][m], c, 64);
  }
}

}  // namespace LK_ISA
}  // namespace lora_kernels
