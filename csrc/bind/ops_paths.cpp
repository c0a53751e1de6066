// Injects torch's thread pool into the kernels, and the op that reports which paths ran.
#include <string>

#include "../cpu/paths.h"
#include "tensor_arg.h"

namespace lora_kernels {
namespace {

void torch_for(int64_t count, int64_t grain, RangeFn fn, void* context) {
  LK_ABI(torch_parallel_for(0, count, grain, fn, context));
}

int torch_threads() {
  uint32_t n = 1;
  LK_ABI(torch_get_num_threads(&n));
  return static_cast<int>(n);
}

const bool injected = (set_parallel_for(torch_for, torch_threads), true);

// "last=vendor stream=3 panel=0 vendor=5 widened=0 add=0 turned=0"
void cpu_paths(StableIValue* stack, uint64_t, uint64_t) {
  std::string report = std::string("last=") + path_name(last_path());
  for (int i = 0; i < kNumPaths; i++) {
    const Path path = static_cast<Path>(i);
    report += std::string(" ") + path_name(path) + "=" + std::to_string(path_count(path));
  }
  stack[0] = torch::stable::detail::from(report);
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(lora_kernels, m) { m.def("_cpu_paths() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("_cpu_paths", &lora_kernels::cpu_paths);
}
