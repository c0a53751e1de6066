// Shared by the files of the exact merge: how a weight is cut into blocks and work items.
//
// A block is a run of 2048 to 4095 weights in row-major order: part of one row where rows are that
// long (the last one of a row takes what is left), else several whole rows. A unit of work is a
// column of blocks, some rows high, so that the update is computed for several rows at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lora_kernels/merge.h"

namespace lora_kernels {

constexpr int64_t kExactBlock = 2048;
constexpr int64_t kExactMaxBlock = 2 * kExactBlock - 1;
constexpr int64_t kExactUnitRows = 8;

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

// What the residual holds of one block. Raw weights where size == weights * sizeof(weight).
struct ExactPiece {
  const uint8_t* data;
  uint32_t size;
  uint32_t sum;
};

// One factor pair, widened: a in panels of columns, t = fl32(scale * b) by rows.
struct ExactTerm {
  const float* a;  // [panel][rank][columns of a panel]
  const float* t;  // [row][rank]
  int64_t rank;
};

struct ExactJob {
  Matrix w;
  ExactLayout layout;
  const ExactTerm* undo;         // or nullptr
  const ExactPiece* undo_piece;  // a block each
  const ExactTerm* apply;        // or nullptr
  ExactPiece* apply_piece;       // a block each; nullptr: nothing is recorded
  uint8_t** chunk;               // a unit each: where its recorded bytes lie (malloc)
  uint8_t* done;                 // a block each: 1 when W holds its new weights
  bool only_done;                // take those blocks back, leave the others
};

}  // namespace lora_kernels
