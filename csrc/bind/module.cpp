// The pybind11 module lora_kernels._C: what is no op. CPU features, the tile choice of the CUDA
// kernels and the facts of this build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "lora_kernels/cpu.h"
#include "lora_kernels/cuda_sm90.h"
#include "lora_kernels/cuda_tile.h"

namespace {

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> features;
#if defined(__x86_64__)
#define LK_FEATURE(name) features[name] = __builtin_cpu_supports(name) != 0
  LK_FEATURE("avx");
  LK_FEATURE("avx2");
  LK_FEATURE("fma");
  LK_FEATURE("avx512f");
  LK_FEATURE("avx512bw");
  LK_FEATURE("avx512dq");
  LK_FEATURE("avx512vl");
  LK_FEATURE("avx512vnni");
#ifdef LK_HAVE_AVX512BF16
  LK_FEATURE("avx512bf16");
#endif
#undef LK_FEATURE
  features["amx_bf16"] = lora_kernels::has_amx();
#endif
  return features;
}

std::map<std::string, std::string> build_info() {
  return {{"compiler", LK_BUILD_COMPILER},
          {"cpu_isas", LK_BUILD_ISAS},
          {"torch", LK_BUILD_TORCH},
          {"cuda", LK_BUILD_CUDA},
          {"cuda_archs", LK_BUILD_CUDA_ARCHS}};
}

std::map<std::string, int> cuda_tile(int64_t m, int64_t n, int64_t k, int64_t r, int sms,
                                     bool invariant) {
  const lora_kernels::CudaTile tile = lora_kernels::cuda_tile(m, n, k, r, sms, invariant);
  return {{"rows", tile.rows}, {"cols", tile.cols}, {"splits", tile.splits}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU features and build facts of lora_kernels.";
  m.def("cpu_features", &cpu_features,
        "Instruction-set extensions that CPU and OS offer, by name.");
  m.def("build_info", &build_info, "Compiler, instruction sets, torch and CUDA of this build.");
  m.def("cuda_tile", &cuda_tile, pybind11::arg("m"), pybind11::arg("n"), pybind11::arg("k"),
        pybind11::arg("r"), pybind11::arg("sms"), pybind11::arg("invariant") = false,
        "Rows and columns of the CUDA kernels' tile, and the parts in which the sum for h is cut.");
  m.def("cuda_sm90_cols", &lora_kernels::cuda_sm90_cols, pybind11::arg("m"), pybind11::arg("n"),
        pybind11::arg("k"), pybind11::arg("r"), pybind11::arg("sms"),
        "Columns of the tile of the CUDA kernel for sm_90, 0 where the others are expected to be "
        "faster.");
  m.def(
      "host_isa", [] { return lora_kernels::isa_name(lora_kernels::best_isa()); },
      "The best kernel level this CPU can run.");
  m.def(
      "active_isa", [] { return lora_kernels::isa_name(lora_kernels::isa()); },
      "The kernel level in use (see LORA_KERNELS_CPU_ISA).");
}
