// How an exact merge cuts a weight into blocks (docs/residual_format.md) and the CPU into work
// items.
//
// A block is a run of 2048 to 4095 weights in row-major order: part of one row where rows are that
// long (the last one of a row takes what is left), else several whole rows. A unit of work is a
// column of blocks, some rows high, so that the update is computed for several rows at once.
#pragma once

#include <cstdint>

namespace lora_kernels {

constexpr int64_t kExactBlock = 2048;
constexpr int64_t kExactMaxBlock = 2 * kExactBlock - 1;
constexpr int64_t kExactUnitRows = 6;  // few: a unit's update stays near the core

struct ExactLayout {
  int64_t rows, cols;
  int64_t group;      // rows of a block
  int64_t per_row;    // blocks side by side
  int64_t blocks;     // in all
  int64_t unit_rows;  // a multiple of group
  int64_t row_units, units;
};

inline ExactLayout exact_layout(int64_t rows, int64_t cols) {
  ExactLayout at = {rows, cols, 1, 1, 0, kExactUnitRows, 0, 0};
  if (rows <= 0 || cols <= 0) return at;
  if (cols >= kExactBlock) {
    at.per_row = cols / kExactBlock;
  } else {
    at.group = (kExactBlock + cols - 1) / cols;
    at.unit_rows = (kExactUnitRows + at.group - 1) / at.group * at.group;
  }
  at.blocks = (rows + at.group - 1) / at.group * at.per_row;
  at.row_units = (rows + at.unit_rows - 1) / at.unit_rows;
  at.units = at.row_units * at.per_row;
  return at;
}

}  // namespace lora_kernels
