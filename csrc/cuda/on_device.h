// A launch on a device, and what became of it in CUDA's words.
#pragma once

#include "device.h"

namespace lora_kernels {

template <class Launch>
const char* on_device(int device, const Launch& launch) {
  // This library's own runtime (linked statically) may not have met the thread yet.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    launch();
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lora_kernels
