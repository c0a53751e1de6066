// Merge family: W += sum over terms of scale * B A, in place, one pass over W. Plain C++ interface.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lora_kernels/cpu.h"

namespace lora_kernels {

// Element (i, j) is at data + i * row_stride + j * col_stride, counted in elements.
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows, cols, row_stride, col_stride;
};

// One low-rank update scale * b a: a is (R, K), b is (N, R), R >= 1. Only read.
struct LowRank {
  Matrix a, b;
  float scale;
};

constexpr int kMaxTerms = 2;

// One weight, w (N, K), any strides, no two elements at one address, and its updates.
struct Merge {
  Matrix w;
  LowRank terms[kMaxTerms];
  int num_terms;
};

// Weights that do not overlap. Accumulated in float32 over the terms' ranks in ascending order and
// rounded once, to nearest even; the same bits on any thread count, alone or in a list.
void merge(const Merge* merges, size_t count);

// Whether merging term into w would leave only finite elements in w; w is only read. False when w,
// a, b or the scale holds an Inf or NaN.
bool merge_is_finite(const Matrix& w, const LowRank& term);

}  // namespace lora_kernels
