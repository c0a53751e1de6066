// The base product of the linear ops: y = x W^T + bias and dx = dy W, on the path that
// csrc/cpu/paths.h chooses. Our own kernels take the low-rank update along; after the vendor's GEMM
// the caller adds it in place.
#pragma once

#include "../cpu/linear.h"
#include "../cpu/paths.h"
#include "widened_product.h"

namespace lora_kernels {

// How a weight lies in memory: its rows contiguous, its columns contiguous, or neither.
enum class Layout { rows, columns, other };

inline Layout layout_of(const TensorArg& w) {
  const int64_t n = w.size(0), k = w.size(1);
  if ((k <= 1 || w.stride(1) == 1) && (n <= 1 || w.stride(0) >= k)) return Layout::rows;
  if ((n <= 1 || w.stride(0) == 1) && (k <= 1 || w.stride(1) >= n)) return Layout::columns;
  return Layout::other;
}

// torch's own GEMM.
inline void vendor_linear(const TensorArg& y, const TensorArg& x, const TensorArg& w,
                          const TensorArg& bias) {
  const NoGrad guard;
  if (bias.defined()) {
    LK_ABI(aoti_torch_cpu_addmm_out(y.get(), bias.get(), x.get(), transposed(w).get(), 1.0, 1.0));
  } else {
    LK_ABI(aoti_torch_cpu_mm_out(y.get(), x.get(), transposed(w).get()));
  }
}

// h (M, R) times the adapter or the weight; `by_columns`: b is stored (N, R).
inline Factors factors(const void* h, int64_t h_stride, const void* b, int64_t b_stride,
                       bool by_columns, int64_t R) {
  return {h, h_stride, b, b_stride, by_columns, R};
}

// y (M, N) = x W^T + bias by the panel kernel, as a job without an update.
inline AddJob panel_forward(const TensorArg& y, const TensorArg& x, const TensorArg& w,
                            const TensorArg& bias) {
  const bool by_rows = layout_of(w) == Layout::rows;
  AddJob job = {};
  job.y = y.data();
  job.y_stride = y.stride(0);
  job.y_dtype = job.b_dtype = dtype_of(x, "x");
  job.base = factors(x.data(), x.stride(0), w.data(), by_rows ? w.stride(0) : w.stride(1), by_rows,
                     w.size(1));
  job.bias = bias.defined() ? bias.data() : nullptr;
  return job;
}

// dx (M, K) = dy W, the same way.
inline AddJob panel_backward(const TensorArg& dx, const TensorArg& dy, const TensorArg& w) {
  const bool by_rows = layout_of(w) == Layout::rows;
  AddJob job = {};
  job.y = dx.data();
  job.y_stride = dx.stride(0);
  job.y_dtype = job.b_dtype = dtype_of(dy, "dy");
  job.base = factors(dy.data(), dy.stride(0), w.data(), by_rows ? w.stride(0) : w.stride(1),
                     !by_rows, w.size(0));
  return job;
}

// y (M, N) = x W^T + bias by the turned kernel, as a task without an update.
inline TurnTask turned_forward(const TensorArg& y, const TensorArg& x, const TensorArg& w,
                               const TensorArg& bias) {
  TurnTask task = {};
  TurnJob& job = task.job;
  job.M = x.size(0);
  job.K = x.size(1);
  job.y_dtype = job.w_dtype = job.b_dtype = dtype_of(x, "x");
  job.w = w.data();
  job.w_stride = w.stride(0);
  job.bias = bias.defined() ? bias.data() : nullptr;
  job.y = y.data();
  job.y_stride = y.stride(0);
  task.x = {x.data(), x.stride(0), job.w_dtype, job.M, job.K, 1.0f, job.w_dtype, nullptr};
  task.N = w.size(0);
  return task;
}

// Whether base_forward takes an update a row along. Of many rows, those of one adapter are cheaper
// as a product of their own, but a row's bits may not depend on their number where `invariant`.
inline bool joins_rows(Path path, int64_t M, int64_t slices, bool invariant) {
  if (path == Path::stream) return true;
  return path == Path::turned && slices == 1 && (invariant || M <= 64);
}

// y (M, N) = x W^T + bias. Returns true where `updates` (see run_base) went in as well.
inline bool base_forward(const TensorArg& y, const TensorArg& x, const TensorArg& w,
                         const TensorArg& bias, const RowUpdate* updates, DType b_dtype,
                         const int64_t* starts, int64_t slices, Path path) {
  record_path(path);
  if (path == Path::vendor) {
    vendor_linear(y, x, w, bias);
    return false;
  }
  if (path == Path::widened) {
    widened_linear(y, x, w, bias);
    return false;
  }
  if (path == Path::turned) {
    TurnTask task = turned_forward(y, x, w, bias);
    task.job.updates = updates;
    task.job.b_dtype = b_dtype;
    run_turn(task);
    return updates != nullptr;
  }
  if (path == Path::panel) {
    const AddTask task = {panel_forward(y, x, w, bias), x.size(0), w.size(0)};
    run_adds(&task, 1);
    return false;
  }
  BaseJob job = {};
  job.x = x.data();
  job.x_stride = x.stride(0);
  job.w = w.data();
  job.w_stride = w.stride(0);
  job.bias = bias.defined() ? bias.data() : nullptr;
  job.y = y.data();
  job.y_stride = y.stride(0);
  job.dtype = dtype_of(x, "x");
  job.K = w.size(1);
  job.updates = updates;
  job.b_dtype = b_dtype;
  run_base(job, x.size(0), starts, slices);
  return true;
}

// dx (M, K) = dy W by torch, or dx += dy W, in place of panel_backward.
inline void torch_backward(const TensorArg& dx, const TensorArg& dy, const TensorArg& w, Path path,
                           bool accumulate = false) {
  if (path == Path::widened) {
    widened_backward(dx, dy, w, accumulate);
    return;
  }
  const NoGrad guard;
  if (accumulate) {
    LK_ABI(aoti_torch_cpu_addmm_out(dx.get(), dx.get(), dy.get(), w.get(), 1.0, 1.0));
  } else {
    LK_ABI(aoti_torch_cpu_mm_out(dx.get(), dy.get(), w.get()));
  }
}

// The path for this weight. A weight with no contiguous dimension goes to the vendor, or is copied
// where the vendor may not be asked.
inline Path path_for(int64_t M, TensorArg& w, DType dtype, bool backward, bool invariant) {
  Layout layout = layout_of(w);
  if (layout == Layout::other) {
    if (!invariant) return Path::vendor;
    w = contiguous_copy(w);
    layout = Layout::rows;
  }
  return choose_path(M, w.size(0), w.size(1), dtype, isa(), backward, layout == Layout::columns,
                     invariant);
}

}  // namespace lora_kernels
