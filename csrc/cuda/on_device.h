// A launch on a device, and what became of it in CUDA's words.
#pragma once

#include "device.h"

namespace lora_kernels {

// Null where there is none. The runtime remembers an error that a call returned: taken back here,
// or the next launch would read it as its own.
inline const char* words(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

template <class Launch>
const char* on_device(int device, const Launch& launch) {
  // This library's own runtime (linked statically) may not have met the thread yet.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    launch();
    error = cudaGetLastError();
  }
  return words(error);
}

}  // namespace lora_kernels
