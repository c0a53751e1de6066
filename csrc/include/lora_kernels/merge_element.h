// What the merge kernels do to one element: the same functions on the host, where they are tested,
// and on a GPU.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LK_HOST_DEVICE inline
#endif

namespace lora_kernels {

// An element of B as it enters the sum: scaled once, so that all terms are one long rank.
LK_HOST_DEVICE float merge_factor(float b, float scale) { return b * scale; }

// One step of the rank.
LK_HOST_DEVICE float merge_step(float sum, float factor, float a) { return fmaf(factor, a, sum); }

// The sum into the weight, before the one rounding.
LK_HOST_DEVICE float merge_apply(float w, float sum) { return w + sum; }

// Whether the bits are those of a finite number: an exponent of all ones is an Inf or NaN.
LK_HOST_DEVICE bool finite_f32(uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }
LK_HOST_DEVICE bool finite_f16(uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; }
LK_HOST_DEVICE bool finite_bf16(uint16_t bits) { return (bits & 0x7f80u) != 0x7f80u; }

}  // namespace lora_kernels
