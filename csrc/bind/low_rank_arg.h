// A weight and its low-rank updates as the merge ops take them from the boxed stack.
#pragma once

#include "lora_kernels/merge.h"
#include "tensor_arg.h"

namespace lora_kernels {

inline Matrix matrix(const TensorArg& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected 2 dimensions, got ", t.dim());
  return {t.data(), dtype_of(t, name), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// Elements that share an address would be updated more than once.
inline Matrix weight_matrix(const TensorArg& t) {
  const Matrix w = matrix(t, "weight");
  const bool by_rows = w.row_stride >= w.col_stride;
  const int64_t outer = by_rows ? w.row_stride : w.col_stride;
  const int64_t inner = by_rows ? w.col_stride : w.row_stride;
  const int64_t outer_size = by_rows ? w.rows : w.cols, inner_size = by_rows ? w.cols : w.rows;
  const bool apart = (inner_size <= 1 || inner > 0) &&
                     (outer_size <= 1 || outer > inner * (inner_size > 0 ? inner_size - 1 : 0));
  STD_TORCH_CHECK(apart, "weight: expected elements of their own, got a view that overlaps itself");
  return w;
}

// First and one past the last address of a matrix.
inline std::pair<const char*, const char*> extent(const Matrix& m) {
  const int64_t size = m.dtype == DType::f32 ? 4 : 2;
  const char* first = static_cast<const char*>(m.data);
  if (m.rows == 0 || m.cols == 0) return {first, first};
  return {first, first + size * (1 + (m.rows - 1) * m.row_stride + (m.cols - 1) * m.col_stride)};
}

inline float scale_of(const TensorArg& scaling, const char* name) {
  STD_TORCH_CHECK(scaling.dim() == 0 && scaling.type() == type_codes().f32, name,
                  ": expected a 0-d float32 tensor");
  return *scaling.as<float>();
}

inline void check_adapter(const Matrix& m, const char* name, int64_t rows, int64_t cols,
                          const Matrix& w) {
  STD_TORCH_CHECK(m.rows == rows && m.cols == cols, name, ": expected shape (", rows, ", ", cols,
                  "), got (", m.rows, ", ", m.cols, ")");
  STD_TORCH_CHECK(m.dtype == w.dtype || m.dtype == DType::f32, name,
                  ": expected the dtype of weight or float32");
  const auto own = extent(m), written = extent(w);
  STD_TORCH_CHECK(own.second <= written.first || written.second <= own.first, name,
                  ": shares memory with the weight");
}

struct Names {
  const char *a, *b, *scaling;
};
inline constexpr Names kOnly = {"lora_a", "lora_b", "scaling"};
inline constexpr Names kOld = {"old_a", "old_b", "old_scaling"};
inline constexpr Names kNew = {"new_a", "new_b", "new_scaling"};

inline LowRank low_rank(const TensorArg* args, const Names& names, double sign, const Matrix& w) {
  LowRank term = {matrix(args[0], names.a), matrix(args[1], names.b), 0.0f};
  const int64_t rank = term.a.rows;
  STD_TORCH_CHECK(rank >= 1, names.a, ": expected a rank of at least 1, got 0");
  check_adapter(term.a, names.a, rank, w.cols, w);
  check_adapter(term.b, names.b, w.rows, rank, w);
  term.scale = static_cast<float>(sign) * scale_of(args[2], names.scaling);
  return term;
}

// Every tensor of the call is owned before the first of them can be refused.
template <int kCount>
struct Args {
  TensorArg tensor[kCount];
  explicit Args(const StableIValue* stack) {
    for (int i = 0; i < kCount; ++i) tensor[i] = take_tensor(stack[i]);
    for (TensorArg& t : tensor) t.read();
  }
};

}  // namespace lora_kernels
