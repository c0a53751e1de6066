// Where elements lie for the products of a warpgroup (wgmma m64nNk16, operands in shared memory):
// sums of a thread, and the descriptors of operands that the tensor memory accelerator wrote with
// its swizzle of 128 bytes, which is tile_offset<8> of mma_maps.h. Pure functions, the same on host
// and device.
#pragma once

#include "mma_maps.h"

namespace lora_kernels {
namespace maps {

// Row and column of sum i of a thread (0 to 127 of its warpgroup), in 64 x N.
LK_MAP int sum_row(int thread, int i) { return thread / 32 * 16 + acc_row(thread % 32, i % 4); }
LK_MAP int sum_col(int thread, int i) { return i / 4 * 8 + acc_col(thread % 32, i % 4); }

// Rows of 64 elements along the sum (128 bytes): eight of them are a pattern of 1024 bytes.
constexpr int kRowBytes = 128, kPatternBytes = 1024;

// `address` in shared memory; `leading` and `stride` in bytes. Bits 62 and 63: swizzle of 128 B.
LK_MAP uint64_t descriptor(uint32_t address, int leading, int stride) {
  return (address >> 4 & 0x3fffu) | static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 | uint64_t{1} << 62;
}

// An operand stored along the sum: the next eight rows are a pattern further; `leading` is not
// read.
LK_MAP uint64_t rows_descriptor(uint32_t address) { return descriptor(address, 16, kPatternBytes); }
// 16 elements further along the sum, inside of the rows.
constexpr uint64_t kNextInRows = 32 >> 4;

// An operand stored across it, in boxes of 64 columns by `depth` rows: the next 64 columns are a
// box further, the next eight of the sum a pattern.
LK_MAP uint64_t boxes_descriptor(uint32_t address, int depth) {
  return descriptor(address, depth * kRowBytes, kPatternBytes);
}
// 16 rows further.
constexpr uint64_t kNextInBoxes = 16 * kRowBytes >> 4;

}  // namespace maps
}  // namespace lora_kernels
