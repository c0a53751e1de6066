// The linear kernels for float16, and the launchers: see linear_sm80.h.
#include "linear_dtype.h"
#include "on_device.h"

using namespace lora_kernels;

extern "C" const char* lk_cuda_shrink(const CudaShrink* args, DType type, int device,
                                      void* stream) {
  return on_device(device, [&] {
    if (type == DType::bf16) return shrink_bf16(*args, stream);
    run_shrink<f16>(*args, static_cast<cudaStream_t>(stream));
  });
}

extern "C" const char* lk_cuda_linear(const CudaLinear* args, DType type, int tile_rows, int device,
                                      void* stream) {
  return on_device(device, [&] {
    if (type == DType::bf16) return linear_bf16(*args, tile_rows, stream);
    run_linear<f16>(*args, tile_rows, static_cast<cudaStream_t>(stream));
  });
}

extern "C" int lk_cuda_multiprocessors(int device) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess ? count : 1;
}
