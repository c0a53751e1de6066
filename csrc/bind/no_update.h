// Whether a low-rank update is zero, so that a fresh adapter (B = 0) can give the bits of the base.
//
// The first number of a trained B that is not zero ends the search, so there it costs nothing.
#pragma once

#include <cmath>
#include <cstring>

#include "tensor_arg.h"

namespace lora_kernels {

// `bytes` of numbers of which all are 0 or -0; `sign` has the sign bits of eight bytes of them.
inline bool zeros_within(const char* values, int64_t bytes, uint64_t sign) {
  constexpr int64_t kBlock = 256;
  while (bytes > 0) {
    const int64_t now = bytes < kBlock ? bytes : kBlock;
    uint64_t words[kBlock / 8] = {}, seen = 0;
    std::memcpy(words, values, static_cast<size_t>(now));
    for (uint64_t word : words) seen |= word;
    if ((seen & ~sign) != 0) return false;
    values += now;
    bytes -= now;
  }
  return true;
}

// Whether one number is 0 or -0.
inline bool is_zero(const char* value, DType dtype) {
  if (dtype == DType::f32) {
    uint32_t bits = 0;
    std::memcpy(&bits, value, 4);
    return (bits << 1) == 0;
  }
  uint16_t bits = 0;
  std::memcpy(&bits, value, 2);
  return (bits & 0x7fff) == 0;
}

inline bool all_zero(const TensorArg& t, DType dtype) {
  if (t.numel() > 0 && !is_zero(static_cast<const char*>(t.data()), dtype)) return false;
  const int64_t rows = t.size(0), row_bytes = t.size(1) * dtype_size(dtype);
  const uint64_t sign = dtype == DType::f32 ? 0x8000000080000000u : 0x8000800080008000u;
  const char* values = static_cast<const char*>(t.data());
  if (t.stride(0) == t.size(1)) return zeros_within(values, rows * row_bytes, sign);
  for (int64_t i = 0; i < rows; i++) {
    if (!zeros_within(values + i * t.stride(0) * dtype_size(dtype), row_bytes, sign)) return false;
  }
  return true;
}

// h (M, R) B^T with B (N, R): 0 everywhere, which takes an h without Inf and NaN as well.
inline bool update_is_zero(const float* h, int64_t h_stride, int64_t M, int64_t R,
                           const TensorArg& b, DType b_dtype) {
  if (!all_zero(b, b_dtype)) return false;
  for (int64_t m = 0; m < M; m++) {
    for (int64_t r = 0; r < R; r++) {
      if (!std::isfinite(h[m * h_stride + r])) return false;
    }
  }
  return true;
}

}  // namespace lora_kernels
