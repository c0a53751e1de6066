// The tile registers of AMX: eight tiles of 16 rows of 64 bytes, and the dot product of bf16 tiles.
//
// Their words are those of the assembler: GCC's own intrinsics tell the compiler nothing of the
// memory that a load reads, and it moves stores behind them. Included where LK_ISA is `amx` alone.
// With LK_EMULATE_AVX512 the tiles are arrays (csrc/emulate/amx.h).
#pragma once

#include "lora_kernels/simd_pairs.h"

#ifdef LK_EMULATE_AVX512
#include "../emulate/amx.h"
#endif

namespace lora_kernels {
namespace LK_ISA {

constexpr int kSide = 16;             // rows of a tile, and columns of a tile of floats
constexpr int kStep = 32;             // bf16 numbers in a row of a tile
constexpr int kTile = kSide * kStep;  // and in a tile
constexpr int64_t kTileRowBytes = 64;

#ifndef LK_EMULATE_AVX512

// The calling thread's tiles, for the life of this object.
class Tiles {
 public:
  Tiles() {
    struct {
      uint8_t palette = 1, first_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; i++) {
      shape.row_bytes[i] = kTileRowBytes;
      shape.rows[i] = kSide;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~Tiles() { __asm__ volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int T>
LK_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
// Rows `stride` bytes apart.
template <int T>
LK_INLINE void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
LK_INLINE void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
// C[m][n] += sum over pairs of A[m][pair] . B[pair][n]; subnormal numbers count as zero.
template <int C, int A, int B>
LK_INLINE void tile_dot() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace LK_ISA
}  // namespace lora_kernels
