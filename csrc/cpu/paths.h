// Which way a base product runs on the CPU, and a record of what ran.
//
//   stream   our own kernel: W is read once, the update joins in registers, one rounding
//   panel    our own kernel over packed panels of W: dy W, a W stored by columns, and shapes where
//            it beats the vendor; update, mask and bias in the same pass, one rounding
//   turned   our own kernel over x turned: W is read where it lies, the update joins in registers,
//            one rounding; for some rows of x, and on tiles for bf16 with any
//   vendor   torch's GEMM (MKL, oneDNN), then the update added in place
//   widened  half-precision W and x in float32 blocks through torch's GEMM, the update as above
//   add      no base product: lora_add_, shrink, expand
//
// The choice depends on shapes, dtype and machine alone: a row without an adapter has the same bits
// whether or not its neighbours have one. Only where one float32 adapter serves all rows and its B
// is zero the vendor's GEMM runs, for the bits of the base layer (bind/no_update.h).
#pragma once

#include <atomic>

#include "lora_kernels/cpu.h"

namespace lora_kernels {

enum class Path : int { stream = 0, panel = 1, vendor = 2, widened = 3, add = 4, turned = 5 };
constexpr int kNumPaths = 6;
const char* path_name(Path path);

// y = x W^T with M rows of x, or dx = dy W (`backward`), N and K the rows and columns of W.
// `by_columns`: W is stored by columns (stride(0) == 1). `invariant`: the bits of a row must not
// depend on M.
Path choose_path(int64_t M, int64_t N, int64_t K, DType dtype, Isa isa, bool backward,
                 bool by_columns, bool invariant);

// Whether a shrink of M rows runs in row form (linear_shrink_isa.cpp).
bool shrink_by_rows(int64_t M, DType x, DType a, Isa isa, bool invariant);

void record_path(Path path);
Path last_path();
int64_t path_count(Path path);

}  // namespace lora_kernels
