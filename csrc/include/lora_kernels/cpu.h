// Plain-C++ interface of the CPU kernels: raw pointers, sizes and a dtype; no framework headers.
//
// Element types, a strided matrix view, the parallel-for hook that the framework binding injects,
// and the choice of instruction set. Every kernel is compiled once per instruction set in
// namespace lora_kernels::<isa>; `isa()` says which of them runs: the best the CPU has, or a lower
// one forced by LORA_KERNELS_CPU_ISA=portable|avx2|avx512|avx512bf16|amx (read once, for tests).
// `amx` has kernels of its own for bf16 products (csrc/cpu/*_amx.cpp), else those of avx512bf16.
// Parallel code splits work by index alone, so results never depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lora_kernels {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

inline int64_t dtype_size(DType t) { return t == DType::f32 ? 4 : 2; }

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };
constexpr int kNumIsas = 5;

// The instruction set that runs, and what the CPU itself offers.
Isa isa();
Isa best_isa();
const char* isa_name(Isa isa);
// Whether CPU and OS give this process AMX's bf16 tiles, which torch's GEMM uses where it can.
bool has_amx();
// Whether this is AMD's Zen 5 or newer: vector units of 512 bits.
bool is_zen5();

// fn(begin, end, context) over disjoint ranges that cover [0, count), each at least `grain` long
// (but for the last). Serial until a binding injects the framework's thread pool.
using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeFn fn, void* context);
using ThreadCount = int (*)();
void set_parallel_for(ParallelFor parallel_for, ThreadCount thread_count);
ParallelFor parallel_for_hook();
int thread_count();

// Runs body(begin, end); `count` work items with at least `grain` of them a thread. Work that fits
// one grain runs on the calling thread with no call into the pool.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain) {
    body(int64_t{0}, count);
    return;
  }
  parallel_for_hook()(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Dropout keep bits of rows [row0, row1) of a rows x cols tensor: byte [m][k / 8], bit k % 8, one
// where element (m, k) is kept; padding bits are zero. `out` is the whole mask, with
// ceil(cols / 8) bytes a row. Defined by Philox4x32-10 over (seed, m * ceil(cols / 8) + k / 8).
void dropout_mask(uint8_t* out, int64_t rows, int64_t cols, uint64_t seed, uint32_t threshold,
                  int64_t row0, int64_t row1);

}  // namespace lora_kernels
