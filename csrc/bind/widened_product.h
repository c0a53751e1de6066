// Half-precision base products by torch's float32 GEMM, for processors without half-precision
// arithmetic: there torch's own bf16 and f16 GEMM runs at a sixth of its float32 speed.
//
// W passes by in blocks of rows, widened into a buffer that stays in the cache; x (or dy) is
// widened once for all blocks, so neither copy has the size of W. One rounding, at the end:
//   y[:, block] = x W[block]^T + bias, each block written as soon as it is done
//   dx          = sum over blocks of dy[:, block] W[block], summed in float32
#pragma once

#include <algorithm>

#include "tensor_arg.h"

namespace lora_kernels {

// While it lives, torch's ops run below autograd.
class NoGrad {
 public:
  NoGrad() : was_(aoti_torch_grad_mode_is_enabled()) {
    if (was_) aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGrad() {
    if (was_) aoti_torch_grad_mode_set_enabled(true);
  }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool was_;
};

constexpr int64_t kWideWeightFloats = 1 << 20, kWideRowFloats = 1 << 21;

// Rows [begin, begin + count) and columns [col, col + cols) of a matrix, sharing its memory.
inline TensorArg block_of(const TensorArg& t, int64_t begin, int64_t count, int64_t col,
                          int64_t cols) {
  const int64_t sizes[] = {count, cols}, strides[] = {t.stride(0), t.stride(1)};
  AtenTensorHandle handle = nullptr;
  LK_ABI(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides,
                                        begin * t.stride(0) + col * t.stride(1), &handle));
  TensorArg block(handle);
  block.read();
  return block;
}

inline TensorArg transposed(const TensorArg& t) {
  const int64_t sizes[] = {t.size(1), t.size(0)}, strides[] = {t.stride(1), t.stride(0)};
  AtenTensorHandle handle = nullptr;
  LK_ABI(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &handle));
  return TensorArg(handle);
}

inline void copy_into(const TensorArg& to, const TensorArg& from) {
  LK_ABI(aoti_torch_copy_(to.get(), from.get(), 0));
}

inline int64_t rows_within(int64_t floats, int64_t columns, int64_t rows) {
  const int64_t fit = floats / std::max<int64_t>(columns, 1);
  return std::min(rows, std::max<int64_t>(fit / 16 * 16, 16));
}

// y (M, N) = x W^T + bias.
inline void widened_linear(const TensorArg& y, const TensorArg& x, const TensorArg& w,
                           const TensorArg& bias) {
  const NoGrad guard;
  const int32_t wide = type_codes().f32;
  const int64_t M = x.size(0), N = w.size(0), K = w.size(1);
  const int64_t rows = rows_within(kWideRowFloats, K, M),
                cols = rows_within(kWideWeightFloats, K, N);
  const TensorArg x_all = new_tensor({rows, K}, wide), w_all = new_tensor({cols, K}, wide),
                  y_all = new_tensor({rows, cols}, wide);
  TensorArg bias_all;
  if (bias.defined()) {
    bias_all = new_tensor({N}, wide);
    copy_into(bias_all, bias);
  }
  for (int64_t m = 0; m < M; m += rows) {
    const int64_t m_count = std::min(rows, M - m);
    const TensorArg x_wide = block_of(x_all, 0, m_count, 0, K);
    copy_into(x_wide, block_of(x, m, m_count, 0, K));
    for (int64_t n = 0; n < N; n += cols) {
      const int64_t n_count = std::min(cols, N - n);
      const TensorArg w_wide = block_of(w_all, 0, n_count, 0, K),
                      y_wide = block_of(y_all, 0, m_count, 0, n_count);
      copy_into(w_wide, block_of(w, n, n_count, 0, K));
      if (bias.defined()) {
        const int64_t size[] = {n_count}, stride[] = {1};
        AtenTensorHandle part = nullptr;
        LK_ABI(aoti_torch__reinterpret_tensor(bias_all.get(), 1, size, stride, n, &part));
        const TensorArg bias_wide(part);
        LK_ABI(aoti_torch_cpu_addmm_out(y_wide.get(), bias_wide.get(), x_wide.get(),
                                        transposed(w_wide).get(), 1.0, 1.0));
      } else {
        LK_ABI(aoti_torch_cpu_mm_out(y_wide.get(), x_wide.get(), transposed(w_wide).get()));
      }
      copy_into(block_of(y, m, m_count, n, n_count), y_wide);
    }
  }
}

// dx (M, K) = dy W, or dx += dy W.
inline void widened_backward(const TensorArg& dx, const TensorArg& dy, const TensorArg& w,
                             bool accumulate) {
  const NoGrad guard;
  const int32_t wide = type_codes().f32;
  const int64_t M = dy.size(0), N = w.size(0), K = w.size(1);
  const int64_t rows = rows_within(kWideRowFloats, std::max(N, K), M),
                cols = rows_within(kWideWeightFloats, K, N);
  const TensorArg dy_all = new_tensor({rows, N}, wide), w_all = new_tensor({cols, K}, wide),
                  dx_all = new_tensor({rows, K}, wide);
  for (int64_t m = 0; m < M; m += rows) {
    const int64_t m_count = std::min(rows, M - m);
    const TensorArg dy_wide = block_of(dy_all, 0, m_count, 0, N),
                    dx_wide = block_of(dx_all, 0, m_count, 0, K);
    copy_into(dy_wide, block_of(dy, m, m_count, 0, N));
    if (accumulate) copy_into(dx_wide, block_of(dx, m, m_count, 0, K));
    for (int64_t n = 0; n < N; n += cols) {
      const int64_t n_count = std::min(cols, N - n);
      const TensorArg w_wide = block_of(w_all, 0, n_count, 0, K),
                      dy_part = block_of(dy_wide, 0, m_count, n, n_count);
      copy_into(w_wide, block_of(w, n, n_count, 0, K));
      if (n == 0 && !accumulate) {
        LK_ABI(aoti_torch_cpu_mm_out(dx_wide.get(), dy_part.get(), w_wide.get()));
      } else {
        LK_ABI(aoti_torch_cpu_addmm_out(dx_wide.get(), dx_wide.get(), dy_part.get(), w_wide.get(),
                                        1.0, 1.0));
      }
    }
    copy_into(block_of(dx, m, m_count, 0, K), dx_wide);
  }
}

}  // namespace lora_kernels
