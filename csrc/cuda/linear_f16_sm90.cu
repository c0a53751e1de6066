// The linear kernels of sm_90a for float16, and the launcher: see linear_sm90.h.
#include "linear_sm90.h"
#include "on_device.h"

namespace lora_kernels {
const char* linear_bf16_sm90(const CudaLinear& args, int cols, int device, void* stream);
}

using namespace lora_kernels;

extern "C" const char* lk_cuda_linear_sm90(const CudaLinear* args, DType type, int cols, int device,
                                           void* stream) {
  const char* error = nullptr;
  const char* const cuda = on_device(device, [&] {
    error = type == DType::bf16 ? linear_bf16_sm90(*args, cols, device, stream)
                                : run_sm90<f16>(*args, cols, device, stream);
  });
  return error != nullptr ? error : cuda;
}

extern "C" bool lk_cuda_is_sm90(int device) {
#if defined(LK_HAVE_SM90A) || defined(LK_EMULATE)
  int major = 0, minor = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
#else
  (void)device;
  return false;
#endif
}
