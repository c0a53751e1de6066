// The jobs of the linear layers' kernels. Each describes a whole product; a kernel call computes a
// rectangle of it, so that callers split work over threads by index and results never depend on
// the split (csrc/cpu/linear.cpp). Strides count elements; the last dimension is always contiguous.
//
//   DotJob   out[m, j]  = alpha * sum_k x[m, k] a[j, k]              both rows contiguous in k
//            (the shrink h = x A^T; dh = dy B with B transposed first)
//   BaseJob  y[m, n]    = sum_k x[m, k] w[n, k] + s_m sum_r h[m, r] b_m[n, r] + bias[n]
//            one pass over w; the update joins the accumulators; one rounding
//   AddJob   y[m, n]   += keep[m, n] * scale * sum_r h[m, r] b[r, n]  (b packed on the fly)
//            (the expand; dx += dh A), with the base product in the same pass where it is ours
//   TurnJob  y[m, n]    = sum_k x[m, k] w[n, k] + sum_r h[m, r] b[n, r] + bias[n]
//            the base product for some rows of x, which a PackJob has turned
//   GradJob  out[r, k]  = alpha * sum_m g[m, r] keep[m, k] x[m, k]    (dA; dB stored transposed)
//
// `rows`, where present, lists the rows of x, h, g, y and the mask that take part.
#pragma once

#include "lora_kernels/cpu.h"

namespace lora_kernels {

struct DotJob {
  const void* x;
  int64_t x_stride;
  DType x_dtype;
  const void* a;
  int64_t a_stride;
  DType a_dtype;
  float* out;
  int64_t out_stride;
  int64_t K;
  float alpha;
  const int32_t* rows;
  const uint8_t* mask;
  int64_t mask_stride;
  bool a_by_rows;  // a is stored (K, R); on tiles alone
};

// What one row of x adds to its base product; rank 0 adds nothing and reads nothing.
struct RowUpdate {
  const float* h;
  const void* b;
  int64_t b_stride;
  int64_t rank;
  float scale;
};

struct BaseJob {
  const void* x;
  int64_t x_stride;
  const void* w;
  int64_t w_stride;
  const void* bias;
  void* y;
  int64_t y_stride;
  DType dtype;
  int64_t K;
  const RowUpdate* updates;  // one a row, or null
  DType b_dtype;
};

// h (M, R) times b, which is stored (R, N) or, `by_columns`, (N, R). R 0: nothing, nothing read.
struct Factors {
  const void* h;
  int64_t h_stride;
  const void* b;
  int64_t b_stride;
  bool by_columns;
  int64_t R;
};

struct AddJob {
  void* y;
  int64_t y_stride;
  DType y_dtype;
  Factors update;  // h is float32; scaled and masked
  DType b_dtype;   // of update.b; y's where there is a base
  float scale;
  Factors base;      // h and b in y's dtype; neither scaled nor masked
  const void* bias;  // in y's dtype, or null
  bool accumulate;   // onto y; otherwise y is only written
  const int32_t* rows;
  const uint8_t* mask;
  int64_t mask_stride;
};

struct GradJob {
  const void* x;
  int64_t x_stride;
  DType x_dtype;
  const float* g;
  int64_t g_stride;
  int64_t M, R;
  float alpha;
  void* out;
  int64_t out_stride;
  DType out_dtype;
  bool transposed;  // out is (K, R)
  const int32_t* rows;
  const uint8_t* mask;
  int64_t mask_stride;
};

constexpr int kTurnRows = 16;        // of x in a panel of the turned form
constexpr int64_t kTurnBlock = 128;  // steps of the sum that it takes at a time

struct PackJob {
  const void* x;
  int64_t x_stride;
  DType x_dtype;
  int64_t M, K;
  float scale;
  DType w_dtype;  // of the product that they are for
  void* panels;   // [ceil(M / kTurnRows)][K][kTurnRows] floats, or as many pairs of bf16 for pairs
                  // of k (turn_steps.h); on tiles as tile_product.h says
};

struct TurnJob {
  const void* panels;  // x, packed
  int64_t M, K;
  const void* w;
  int64_t w_stride;
  DType w_dtype;
  const void* h;  // scaled and packed as x is; R 0: none
  const void* b;  // (N, R)
  int64_t b_stride, R;
  DType b_dtype;
  const void* bias;  // in w's dtype, or null
  void* y;
  int64_t y_stride;
  DType y_dtype;             // w's, or float32
  const RowUpdate* updates;  // one a row of x, with a B of b_dtype, or null
};

// 64-byte aligned memory of the calling thread, kept between calls; its seven slots are separate.
// Kernels use 0 and 1; callers of the run_ functions may use the others.
void* thread_scratch(int slot, int64_t bytes);

static inline const char* element(const void* p, int64_t index, DType t) {
  return static_cast<const char*>(p) + index * dtype_size(t);
}
static inline char* element(void* p, int64_t index, DType t) {
  return static_cast<char*>(p) + index * dtype_size(t);
}

}  // namespace lora_kernels
