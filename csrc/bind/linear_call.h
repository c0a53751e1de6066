// What the ops of one adapter on a linear layer share: the checked shapes of a call, the shrink as
// a task, and the second half of the forward.
#pragma once

#include "no_update.h"
#include "segments.h"

namespace lora_kernels {

// The shapes of one call, checked: letters as in ops/library.py.
struct Shape {
  int64_t M = 0, K = 0, N = 0, R = 0, S = 1;
  std::vector<int64_t> starts;  // of the slices' columns, and N
  DType dtype = DType::f32, a_dtype = DType::f32, b_dtype = DType::f32;
};

inline float read_scaling(TensorArg& t) {
  t.read();
  STD_TORCH_CHECK(t.numel() == 1 && t.type() == type_codes().f32,
                  "scaling: expected a 0-d float32 tensor");
  return *t.as<float>();
}

// x (M, K) and the adapter; N comes from lora_b.
inline Shape read_shape(TensorArg& x, TensorArg& a, TensorArg& b, const Splits& splits) {
  Shape s;
  x.read();
  a.read();
  b.read();
  STD_TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions");
  s.M = x.size(0);
  s.K = x.size(1);
  s.dtype = dtype_of(x, "x");
  s.a_dtype = dtype_of(a, "lora_a");
  s.b_dtype = dtype_of(b, "lora_b");
  check_adapter_dtype(s.a_dtype, s.dtype, "lora_a");
  check_adapter_dtype(s.b_dtype, s.dtype, "lora_b");
  STD_TORCH_CHECK(b.dim() == 2, "lora_b: expected (out_features, rank)");
  s.N = b.size(0);
  s.R = b.size(1);
  STD_TORCH_CHECK(s.R > 0, "lora_a: expected rank >= 1");
  if (splits.has_value()) {
    s.S = static_cast<int64_t>(splits->size());
    STD_TORCH_CHECK(s.S > 0 && a.dim() == 3 && a.size(0) == s.S,
                    "lora_a: expected (slices, rank, in_features)");
  } else {
    STD_TORCH_CHECK(a.dim() == 2, "lora_a: expected (rank, in_features)");
  }
  s.starts = slice_starts(splits, s.N);
  STD_TORCH_CHECK(a.size(a.dim() - 1) == s.K && a.size(a.dim() - 2) == s.R,
                  "lora_a: expected rank and in_features to match lora_b and x");
  make_row_major(x);
  if (s.S > 1 || a.dim() == 3) {
    make_contiguous(a);
  } else {
    make_row_major(a);
  }
  make_row_major(b);
  return s;
}

inline void check_weight(TensorArg& w, const Shape& s) {
  w.read();
  STD_TORCH_CHECK(w.dim() == 2 && w.size(0) == s.N && w.size(1) == s.K,
                  "weight: expected (out_features, in_features)");
  STD_TORCH_CHECK(dtype_of(w, "weight") == s.dtype, "weight: expected the dtype of x");
}

inline void check_bias(TensorArg& bias, const Shape& s) {
  if (!bias.defined()) return;
  bias.read();
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == s.N, "bias: expected (out_features)");
  STD_TORCH_CHECK(dtype_of(bias, "bias") == s.dtype, "bias: expected the dtype of x");
  make_contiguous(bias);
}

inline void check_rows(TensorArg& t, int64_t rows, int64_t cols, const char* name) {
  t.read();
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name,
                  ": expected shape (", rows, ", ", cols, ")");
}

inline void check_written(TensorArg& y, int64_t rows, int64_t cols, const char* name) {
  check_rows(y, rows, cols, name);
  STD_TORCH_CHECK((cols <= 1 || y.stride(1) == 1) && (rows <= 1 || y.stride(0) >= cols), name,
                  ": expected rows that are contiguous and do not overlap");
}

inline int64_t row_stride_a(const TensorArg& a) { return a.stride(a.dim() - 2); }

inline DotTask shrink_task(const Shape& s, const TensorArg& x, const TensorArg& a, float* h,
                           bool invariant) {
  DotTask t = {};
  t.by_rows = shrink_by_rows(s.M, s.dtype, s.a_dtype, isa(), invariant);
  t.job.x = x.data();
  t.job.x_stride = x.stride(0);
  t.job.x_dtype = s.dtype;
  t.job.a = a.data();
  t.job.a_stride = s.S * s.R > 1 ? (s.S > 1 ? s.K : row_stride_a(a)) : s.K;
  t.job.a_dtype = s.a_dtype;
  t.job.out = h;
  t.job.out_stride = s.S * s.R;
  t.job.K = s.K;
  t.job.alpha = 1.0f;
  t.M = s.M;
  t.R = s.S * s.R;
  return t;
}

// y += scale * h B^T, a task a slice.
inline std::vector<AddTask> expand_tasks(const Shape& s, const TensorArg& y, DType y_dtype,
                                         const float* h, int64_t h_stride, const TensorArg& b,
                                         float scale) {
  std::vector<AddTask> tasks;
  for (int64_t i = 0; i < s.S; i++) {
    AddTask t = {};
    t.job.y = element(y.data(), s.starts[i], y_dtype);
    t.job.y_stride = y.stride(0);
    t.job.y_dtype = y_dtype;
    t.job.update =
        factors(h + i * s.R, h_stride, element(b.data(), s.starts[i] * b.stride(0), s.b_dtype),
                b.stride(0), true, s.R);
    t.job.b_dtype = s.b_dtype;
    t.job.scale = scale;
    t.job.accumulate = true;
    t.M = s.M;
    t.N = s.starts[i + 1] - s.starts[i];
    tasks.push_back(t);
  }
  return tasks;
}

inline void expand(const Shape& s, const TensorArg& y, DType y_dtype, const float* h,
                   int64_t h_stride, const TensorArg& b, float scale) {
  const auto tasks = expand_tasks(s, y, y_dtype, h, h_stride, b, scale);
  run_adds(tasks.data(), static_cast<int64_t>(tasks.size()));
}

// y = x W^T + bias + scale * h B^T by the turned kernel, of one slice.
inline TurnTask turned_update(const Shape& s, const TensorArg& y, const TensorArg& x,
                              const TensorArg& w, const TensorArg& bias, const TensorArg& b,
                              float scale, const float* h, int64_t h_stride) {
  TurnTask task = turned_forward(y, x, w, bias);
  task.job.b = b.data();
  task.job.b_stride = b.stride(0);
  task.job.b_dtype = s.b_dtype;
  task.job.R = s.R;
  task.h = {h, h_stride, DType::f32, s.M, s.R, scale, s.dtype, nullptr};
  return task;
}

// Whether turned_update computes the layer. On tiles it rounds s h to bf16, as no other row's
// adapter would be: not where a row's bits may not depend on its batch.
inline bool turns_whole(const Shape& s, Path path, bool invariant) {
  return path == Path::turned && s.S == 1 && turn_adds(s.dtype, s.b_dtype) && !invariant;
}

// Multiplications up to which a product costs less than a call of the vendor's GEMM.
constexpr int64_t kTinyProduct = 1024;

// y = x W^T + bias + scale * h B^T, with h (M, S * R) made before. In float32 a fresh adapter
// (B = 0) gives the bits of the base layer: the vendor's GEMM alone, unless a row's bits must not
// depend on M. Half precision keeps its own kernels, which are several times faster than torch's.
inline void finish(const Shape& s, const TensorArg& y, const TensorArg& x, TensorArg& w,
                   const TensorArg& bias, const TensorArg& b, float scale, bool invariant,
                   const float* h, int64_t h_stride) {
  if (s.M == 0 || s.N == 0) return;
  if (!invariant && s.dtype == DType::f32 && s.M * s.N * s.K > kTinyProduct &&
      update_is_zero(h, h_stride, s.M, s.S * s.R, b, s.b_dtype)) {
    record_path(Path::vendor);
    vendor_linear(y, x, w, bias);
    return;
  }
  const Path path = path_for(s.M, w, s.dtype, false, invariant);
  RowUpdate* updates = nullptr;
  const bool as_one = turns_whole(s, path, invariant);
  if (!as_one && joins_rows(path, s.M, s.S, invariant) && s.R > 0) {
    updates = static_cast<RowUpdate*>(
        thread_scratch(2, s.S * s.M * static_cast<int64_t>(sizeof(RowUpdate))));
    for (int64_t i = 0; i < s.S; i++) {
      for (int64_t m = 0; m < s.M; m++) {
        updates[i * s.M + m] = {h + m * h_stride + i * s.R, b.data(), b.stride(0), s.R, scale};
      }
    }
  }
  if (path == Path::panel && s.S == 1 && s.b_dtype == s.dtype) {
    record_path(path);
    AddTask task = {panel_forward(y, x, w, bias), s.M, s.N};
    task.job.update = factors(h, h_stride, b.data(), b.stride(0), true, s.R);
    task.job.scale = scale;
    run_adds(&task, 1);
  } else if (as_one) {
    record_path(path);
    run_turn(turned_update(s, y, x, w, bias, b, scale, h, h_stride));
  } else if (!base_forward(y, x, w, bias, updates, s.b_dtype, s.starts.data(), s.S, path)) {
    expand(s, y, s.dtype, h, h_stride, b, scale);
  }
}

}  // namespace lora_kernels
