// Run-time choice of the instruction set, and the injected thread pool.
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "lora_kernels/cpu.h"

namespace lora_kernels {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};

bool detect_amx() {
#if defined(__x86_64__) && !defined(LK_EMULATE_AVX512)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kXsave = 1u << 27, kTileState = 3u << 17;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kXsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileState) != kTileState) return false;
#ifdef __linux__
  // The kernel gives the tiles' state to processes that ask for it.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return true;
#endif
#else
  return false;
#endif
}

bool detect_zen5() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return false;
  const bool amd = b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
  if (!amd || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  const unsigned base = a >> 8 & 0xf, extended = a >> 20 & 0xff;
  return base == 0xf && base + extended >= 0x1a;
#else
  return false;
#endif
}

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::portable;
#ifdef LK_EMULATE_AVX512  // csrc/emulate
  return Isa::amx;
#endif
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return Isa::avx2;
  }
#ifdef LK_HAVE_AVX512BF16  // a compiler without the level does not know its name either
  if (__builtin_cpu_supports("avx512bf16")) {
#ifdef LK_HAVE_AMX
    if (has_amx()) return Isa::amx;
#endif
    return Isa::avx512bf16;
  }
#endif
  return Isa::avx512;
#else
  return Isa::portable;
#endif
}

// A forced instruction set above what the CPU has is cut to it: running it would crash.
Isa choose() {
  const char* want = std::getenv("LORA_KERNELS_CPU_ISA");
  if (want != nullptr) {
    for (int i = 0; i < kNumIsas; i++) {
      if (std::strcmp(want, kNames[i]) == 0 && i < static_cast<int>(best_isa())) {
        return static_cast<Isa>(i);
      }
    }
  }
  return best_isa();
}

void serial_for(int64_t count, int64_t, RangeFn fn, void* context) { fn(0, count, context); }
int one_thread() { return 1; }

ParallelFor g_parallel_for = serial_for;
ThreadCount g_thread_count = one_thread;

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

bool has_amx() {
  static const bool has = detect_amx();
  return has;
}

bool is_zen5() {
  static const bool is = detect_zen5();
  return is;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

void set_parallel_for(ParallelFor parallel_for, ThreadCount thread_count) {
  g_parallel_for = parallel_for;
  g_thread_count = thread_count;
}
ParallelFor parallel_for_hook() { return g_parallel_for; }
int thread_count() { return g_thread_count(); }

}  // namespace lora_kernels
