// The instructions of sm_90a that CUDA C++ has no word for: barriers that count bytes, tiles copied
// by the tensor memory accelerator, and products of a warpgroup. With LK_EMULATE the same names run
// on the host (csrc/emulate/instructions_sm90.h).
#pragma once

#include "device.h"
#include "lora_kernels/wgmma_maps.h"

#if defined(LK_EMULATE)

#include "../emulate/instructions_sm90.h"

#else

#include <cuda.h>

#include <atomic>

namespace lora_kernels {
namespace device {

using TensorMap = CUtensorMap;

// ---- barriers in shared memory; `parity` is that of the phase that is waited for, from 0 on ----

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// What was initialised is there for the copies.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// And the phase ends no sooner than that many bytes more have been copied.
__device__ __forceinline__ void arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// A wait that does not end in many seconds is a fault of the kernel: the launch fails, and no GPU
// hangs.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  const uint32_t address = shared_address(barrier);
  for (uint32_t tries = 0;; ++tries) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
    if (done != 0) return;
    if (tries == 1u << 28) asm volatile("trap;");
  }
}
// `threads` threads meet; 0 is the barrier of __syncthreads.
__device__ __forceinline__ void sync_some(int barrier, int threads) {
  __syncwarp();
  asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- copies ----

// The box of the map whose first element is (row, col), what is outside as zeros; its bytes count
// at the barrier.
__device__ __forceinline__ void load_tile(void* to, const TensorMap* map, uint64_t* barrier,
                                          int row, int col) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared_address(to)),
      "l"(map), "r"(col), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void store_16(void* to, const uint32_t (&words)[4]) {
  *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ __forceinline__ void store_global_16(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
// What this thread stored in shared memory is there for products and copies.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- registers, launches ----

template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
// Until the launch before this one is done and what it wrote is there; see launch().
__device__ __forceinline__ void wait_for_launch_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---- products of a warpgroup ----

// Before the first product of a group: registers and shared memory are as the program says.
__device__ __forceinline__ void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the newest kLeft groups are done.
template <int kLeft>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// acc (64, 2 kSums) += left (64, 16) right (16, 2 kSums); operands by descriptor, sums as in
// wgmma_maps.h. The right operand is stored as (columns, sum), or, kTurned, (sum, columns).
template <class T, bool kTurned, int kSums>
__device__ __forceinline__ void multiply_tile(float (&acc)[kSums], uint64_t left, uint64_t right);

#define LK_TEN(d)                                                                                  \
  "%" #d "0, %" #d "1, %" #d "2, %" #d "3, %" #d "4, %" #d "5, %" #d "6, %" #d "7, %" #d "8, %" #d \
  "9, "
#define LK_SUM8(i)                                                                      \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), \
      "+f"(acc[i + 5]), "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define LK_SUM32(i) LK_SUM8(i), LK_SUM8(i + 8), LK_SUM8(i + 16), LK_SUM8(i + 24)
#define LK_SUM64(i) LK_SUM32(i), LK_SUM32(i + 32)
#define LK_TO_60 LK_TEN() LK_TEN(1) LK_TEN(2) LK_TEN(3) LK_TEN(4) LK_TEN(5)
#define LK_TO_32 LK_TEN() LK_TEN(1) LK_TEN(2) "%30, %31"
#define LK_TO_64 LK_TO_60 "%60, %61, %62, %63"
#define LK_TO_128 \
  LK_TO_60 LK_TEN(6) LK_TEN(7) LK_TEN(8) LK_TEN(9) LK_TEN(10) LK_TEN(11) "%120, %121, %122, %123, " \
                                                                         "%124, %125, %126, %127"
// Operands after the sums: descriptors, and 1 for "add to the sums", which must be a predicate.
#define LK_PRODUCT(shape, name, sums, turned, left_at, right_at, one_at)                       \
  "{\n.reg .pred add;\nsetp.ne.b32 add, %" #one_at ", 0;\nwgmma.mma_async.sync.aligned." shape \
  ".f32." name "." name " {" sums "}, %" #left_at ", %" #right_at ", add, 1, 1, 0, " #turned   \
  ";\n}\n"
#define LK_PRODUCTS_OF(T, name, turned, count, shape, sums, outs, left_at, right_at, one_at)       \
  template <>                                                                                      \
  __device__ __forceinline__ void multiply_tile<T, turned, count>(float (&acc)[count],             \
                                                                  uint64_t left, uint64_t right) { \
    asm volatile(LK_PRODUCT(shape, name, sums, turned, left_at, right_at, one_at)                  \
                 : outs                                                                            \
                 : "l"(left), "l"(right), "r"(1));                                                 \
  }
#define LK_BOTH LK_SUM64(0), LK_SUM64(64)
#define LK_PRODUCTS(T, name, turned)                                                   \
  LK_PRODUCTS_OF(T, name, turned, 32, "m64n64k16", LK_TO_32, LK_SUM32(0), 32, 33, 34)  \
  LK_PRODUCTS_OF(T, name, turned, 64, "m64n128k16", LK_TO_64, LK_SUM64(0), 64, 65, 66) \
  LK_PRODUCTS_OF(T, name, turned, 128, "m64n256k16", LK_TO_128, LK_BOTH, 128, 129, 130)
LK_PRODUCTS(bf16, "bf16", 0)
LK_PRODUCTS(bf16, "bf16", 1)
LK_PRODUCTS(f16, "f16", 0)
LK_PRODUCTS(f16, "f16", 1)
#undef LK_PRODUCTS
#undef LK_BOTH
#undef LK_PRODUCTS_OF
#undef LK_PRODUCT
#undef LK_TO_128
#undef LK_TO_64
#undef LK_TO_32
#undef LK_TO_60
#undef LK_SUM64
#undef LK_SUM32
#undef LK_SUM8
#undef LK_TEN

// ---- the host's part ----

// Null, or what is wrong.
inline const char* encode(TensorMap* map, const void* data, int64_t rows, int64_t cols,
                          int64_t row_stride, int box_rows, int box_cols, bool is_bf16) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode_tiled = [] {
    // From the driver, so that nothing links to it: the library loads where there is none.
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<Encode>(found);
  }();
  if (encode_tiled == nullptr) return "the driver has no cuTensorMapEncodeTiled (CUDA 12.0)";
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every[2] = {1, 1};
  const CUresult error = encode_tiled(
      map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(data), size, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused an operand";
}

// Launches a kernel; with `early` it may start before the launch before it is done (programmatic
// dependent launch): it must call wait_for_launch_before() before it touches what that one writes.
// Everything that ran before that one is done.
template <class Job>
cudaError_t launch(void (*kernel)(const Job), unsigned grid, unsigned threads, size_t shared,
                   cudaStream_t stream, int device, const Job& job, bool early,
                   std::atomic<uint64_t>& prepared) {
  // Once a device: it costs more than the launch. A device beyond 63 asks each time.
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((prepared.load(std::memory_order_relaxed) & bit) == 0) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    prepared.fetch_or(bit, std::memory_order_relaxed);
  }
  cudaLaunchAttribute serial = {};
  serial.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  serial.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &serial;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, job);
}

}  // namespace device
}  // namespace lora_kernels

#endif
