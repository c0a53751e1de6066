// The one op that is about the library itself: which instruction set its kernels run on.
#include <torch/csrc/stable/library.h>

#include "lora_kernels/cpu.h"

namespace {

int64_t cpu_isa() { return static_cast<int64_t>(lora_kernels::isa()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lora_kernels, m) { m.def("_cpu_isa() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
}
