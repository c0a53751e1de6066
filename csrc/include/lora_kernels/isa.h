// Declares and picks the per-instruction-set versions of a kernel (csrc/cpu/*_isa.cpp).
#pragma once

#include "lora_kernels/cpu.h"

// A level that the compiler did not know falls to the one below.
#ifdef LK_HAVE_AVX2
#define LK_NS_AVX2 avx2
#else
#define LK_NS_AVX2 portable
#endif
#ifdef LK_HAVE_AVX512
#define LK_NS_AVX512 avx512
#else
#define LK_NS_AVX512 LK_NS_AVX2
#endif
#ifdef LK_HAVE_AVX512BF16
#define LK_NS_AVX512BF16 avx512bf16
#else
#define LK_NS_AVX512BF16 LK_NS_AVX512
#endif

// Puts the declarations into namespace lora_kernels::<level> of every level.
#define LK_DECLARE_FOR_ISAS(...)       \
  namespace lora_kernels::portable {   \
  __VA_ARGS__                          \
  }                                    \
  namespace lora_kernels::avx2 {       \
  __VA_ARGS__                          \
  }                                    \
  namespace lora_kernels::avx512 {     \
  __VA_ARGS__                          \
  }                                    \
  namespace lora_kernels::avx512bf16 { \
  __VA_ARGS__                          \
  }

// A pointer to the version of `function` for lora_kernels::isa(). What is compiled for amx alone is
// picked by its callers.
#define LK_SELECT_ISA(function)                                                                 \
  (::lora_kernels::isa() >= ::lora_kernels::Isa::avx512bf16                                     \
       ? &::lora_kernels::LK_NS_AVX512BF16::function                                            \
   : ::lora_kernels::isa() == ::lora_kernels::Isa::avx512                                       \
       ? &::lora_kernels::LK_NS_AVX512::function                                                \
   : ::lora_kernels::isa() == ::lora_kernels::Isa::avx2 ? &::lora_kernels::LK_NS_AVX2::function \
                                                        : &::lora_kernels::portable::function)
