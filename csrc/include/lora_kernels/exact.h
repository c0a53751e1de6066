// Exact merge: W <- round(W + update), undone bit for bit with a residual. Plain C++ interface.
//
// The arithmetic, the same bits on every machine (see docs/residual_format.md):
//   t = fl32(scale * b);  acc = fma(t, a, acc) over the rank, ascending, from +0;  u = fl32(w +
//   acc); m = u rounded to W's dtype, to nearest even.
// `m` as a function of `w` never decreases (-0 before +0), so the weights that give a merged value
// are an interval of neighbours. The residual says which of them it was.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lora_kernels/merge.h"

namespace lora_kernels {

enum class ExactStatus : int {
  ok = 0,
  not_finite = 1,  // Inf or NaN in W, A, B, the scale or the result
  malformed = 2,   // the body is not one of a weight of this shape
  mismatch = 3,    // a block's merged weights or residual bits are not what they were
  no_memory = 4,
};

struct ExactResult {
  ExactStatus status;
  int64_t block;  // the first block found to be at fault, -1 where it is none in particular
};

// The body of a residual. `allocate(context, size)` gives the memory for it, once, after all else
// has succeeded and where the body is not empty; nullptr fails the call.
struct ExactBody {
  uint8_t* (*allocate)(void* context, size_t size);
  void* context;
};

// Undoes `undo` (with its residual body), then merges `apply` (its body is allocated); either may
// be nullptr. W is read and written once. Whatever goes wrong, W is as before.
ExactResult exact_pass(const Matrix& w, const LowRank* undo, const uint8_t* body, size_t body_size,
                       const LowRank* apply, const ExactBody* out);

}  // namespace lora_kernels
