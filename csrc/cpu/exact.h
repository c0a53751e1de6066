// Shared by the files of the exact merge on the CPU: its pieces, factors and work.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lora_kernels/exact_layout.h"
#include "lora_kernels/merge.h"

namespace lora_kernels {

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
