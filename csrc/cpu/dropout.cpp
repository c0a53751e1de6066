// Dropout keep bits of a range of rows: the vector kernel over whole groups of eight columns, then
// the padding bits of each row's last byte cleared. A threshold of 65536 (p rounds to one) drops
// everything; 16-bit draws cannot express it, so it is not left to the compare.
#include <cstring>

#include "lora_kernels/cpu.h"
#include "lora_kernels/isa.h"

LK_DECLARE_FOR_ISAS(void dropout_groups(uint8_t* out, uint64_t first, int64_t count, uint64_t seed,
                                        uint32_t threshold);)

namespace lora_kernels {

void dropout_mask(uint8_t* out, int64_t rows, int64_t cols, uint64_t seed, uint32_t threshold,
                  int64_t row0, int64_t row1) {
  static const auto kernel = LK_SELECT_ISA(dropout_groups);
  const int64_t groups = (cols + 7) / 8;
  row1 = row1 < rows ? row1 : rows;
  if (row0 >= row1 || groups == 0) return;
  const int64_t first = row0 * groups, count = (row1 - row0) * groups;
  if (threshold > 0xffffu) {
    std::memset(out + first, 0, static_cast<size_t>(count));
    return;
  }
  kernel(out + first, static_cast<uint64_t>(first), count, seed, threshold);
  if (cols % 8 != 0) {
    const uint8_t live = static_cast<uint8_t>((1u << (cols % 8)) - 1u);
    for (int64_t m = row0; m < row1; ++m) out[(m + 1) * groups - 1] &= live;
  }
}

}  // namespace lora_kernels
