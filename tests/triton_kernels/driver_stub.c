/* A libcuda.so.1 that runs nothing and refuses what a GPU of compute capability 9.0 would refuse: the limits of launches
   (CUDA C++ Programming Guide, "Compute Capabilities") and of tensor maps (cuTensorMapEncodeTiled). Triton's launcher is
   linked to it by launch_driver.py. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

#define MOST_SHARED 232448
#define DONE \
  { return CUDA_SUCCESS; }

static CUresult refuse(const char* what, long long value) {
  fprintf(stderr, "driver stub: %s: %lld\n", what, value);
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute what, CUdevice device) {
  *value = what == CU_DEVICE_ATTRIBUTE_WARP_SIZE                ? 32
           : what == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT   ? 132
           : what == CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK ? 65536
                                                                : MOST_SHARED;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) DONE
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetLimit(size_t* value, CUlimit what) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit what, size_t value) DONE
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "refused by the driver stub";
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (memcmp(image, "\177ELF", 4) != 0) return refuse("no machine code", 0);
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)strdup(name);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute what, CUfunction function) {
  *value = what == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute what, int value) {
  const int shared = what == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
  return shared && value > MOST_SHARED ? refuse("shared memory", value) : CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) DONE
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* config) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute what, CUdeviceptr pointer) {
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                const cuuint32_t* every, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const int element = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  const cuuint32_t inner = box[0] * element;
  const cuuint32_t span = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
                          : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                          : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                                                                 : ~0u;
  if ((size_t)map % 64 != 0) return refuse("address of a tensor map", (long long)map);
  if ((size_t)base % 16 != 0) return refuse("address of a tensor", (long long)base);
  if (inner % 16 != 0 || inner > span) return refuse("bytes of a row of a box", inner);
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (size[i] == 0 || size[i] > 1ull << 32) return refuse("size of a tensor", size[i]);
    if (box[i] == 0 || box[i] > 256) return refuse("size of a box", box[i]);
    if (every[i] != 1) return refuse("step of a box", every[i]);
    if (i + 1 < rank && (stride[i] % 16 != 0 || stride[i] >= 1ull << 40)) return refuse("stride", stride[i]);
  }
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  const unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (config->gridDimX == 0 || config->gridDimX > 0x7fffffffu) return refuse("grid, x", config->gridDimX);
  if (config->gridDimY == 0 || config->gridDimY > 65535) return refuse("grid, y", config->gridDimY);
  if (config->gridDimZ == 0 || config->gridDimZ > 65535) return refuse("grid, z", config->gridDimZ);
  if (threads == 0 || threads > 1024) return refuse("threads of a block", threads);
  if (config->sharedMemBytes > MOST_SHARED) return refuse("shared memory", config->sharedMemBytes);
  printf("launched %s %u\n", (const char*)function, config->numAttrs);
  fflush(stdout);
  return CUDA_SUCCESS;
}
