// Exact merge and its undoing on CUDA cores, for every GPU from sm_80 up: the arithmetic and the
// bytes of docs/residual_format.md, the same as on the CPU.
//
// A thread block takes a column of up to four blocks of weights, so that a value of A serves four
// rows; where a row is shorter than a block it takes one block of several rows. A thread owns eight
// neighbouring weights in each half of a block: 2048 weights, and what a last block has beyond
// them. The updates of all four are summed in registers, then the blocks go through the codec one
// by one: their updates lie in shared memory, bit positions come from a scan over the threads.
//
// Nothing is written before everything is known to be right. A merge is measured first (sizes,
// checksums, whether all is finite), the host makes room for the body, and a second pass writes it
// and the weights. An undo checks every block, and the pass that writes does nothing where one was
// found to be wrong. What is wrong is one number, of which the smallest is kept: the lowest block.

#include <cstring>

#include "exact_merge.h"
#include "exact_undo.h"
#include "lora_kernels/exact.h"
#include "on_device.h"

namespace {

using namespace lora_kernels;
using namespace exact;

// A column of blocks: the updates of as many as there are slots for, then the codec over each.
template <class T, bool kEncode>
__global__ void __launch_bounds__(kThreads, kBlocks) exact_kernel(const __grid_constant__ Job job) {
  __shared__ Shared shared;
  const ExactLayout& at = job.at;
  const bool wide = at.group == 1;
  const int64_t groups = (at.rows + at.group - 1) / at.group;
  const int64_t side = blockIdx.x % at.per_row;
  const int64_t first = blockIdx.x / at.per_row * (wide ? kRows : 1);
  // One thread looks, for all to agree: other blocks may find something at this moment.
  if (threadIdx.x == 0) shared.stop = faulty(job, first * at.per_row + side);
  __syncthreads();
  if (shared.stop) return;
  const int64_t last = wide && first + kRows < groups ? first + kRows : wide ? groups : first + 1;
  const int halves = !wide || Place<T>(job, first, side).count > kHalf ? 2 : 1;
  const int high = wide ? kSlots / halves : 1;

#pragma unroll 1
  for (int64_t top = first; top < last; top += high) {
    const Place<T> start(job, top, side);
    const int rows = static_cast<int>(last - top < high ? last - top : high);
    float acc[kSlots][kOwn] = {};
    if (!wide) {
      sum_narrow(job.args.term, start.row0, start.cols, start.count, acc);
    } else if (halves == 1) {
      sum_wide<1>(job.args.term, top, rows, start.col0, start.cols, acc);
    } else {
      sum_wide<2>(job.args.term, top, rows, start.col0, start.cols, acc);
    }
#pragma unroll 1
    for (int y = 0; y < rows; ++y) {
      // Every register by a number that is known when this is compiled.
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if (i / halves != y) continue;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          const int p = i % halves * kHalf + static_cast<int>(threadIdx.x) * kOwn + j;
          shared.update[spread(p)] = acc[i][j];
        }
      }
      __syncthreads();
      const Place<T> place(job, top + y, side);
      if constexpr (kEncode) {
        encode<T>(job, place, shared);
      } else {
        decode<T>(job, place, shared);
      }
      __syncthreads();
    }
  }
}

// Whether A, B and the scale are finite.
__global__ void __launch_bounds__(kThreads) factors_kernel(const __grid_constant__ Job job) {
  const CudaTerm& term = job.args.term;
  const int64_t a_size = term.r * job.args.k, b_size = job.args.n * term.r;
  const auto finite = [](float v) { return magnitude(v) < 0x7f800000u; };
  bool ok = finite(*term.scaling);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a_size + b_size;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t j = i - a_size;
    const float v =
        i < a_size
            ? load_adapter(term.a, term.a_type,
                           i / job.args.k * term.a_row + i % job.args.k * term.a_col)
            : load_adapter(term.b, term.b_type, j / term.r * term.b_row + j % term.r * term.b_col);
    ok = ok && finite(v);
  }
  if (!ok) note(job, -1, kNotFinite);
}

// Where each block's bytes begin, and the size of the body. With kParse sizes and checksums are
// those of the body, which must be one of this weight. One thread block.
template <bool kParse>
__global__ void __launch_bounds__(kScanThreads)
    offsets_kernel(const __grid_constant__ Job job, uint32_t elem) {
  __shared__ uint32_t warp_sum[kThreads / 32];
  static_assert(kScanThreads == kThreads, "scan() is over kThreads");
  const ExactLayout& at = job.at;
  const uint8_t* const body = job.args.body;
  const int64_t table = at.blocks * 6;
  if (kParse && job.args.body_size < table) {
    if (threadIdx.x == 0) note(job, -1, kMalformed);
    return;
  }
  unsigned long long before = static_cast<unsigned long long>(table);
  bool bad = false;
  for (int64_t i = 0; i < at.blocks; i += kThreads) {
    const int64_t block = i + threadIdx.x;
    const bool live = block < at.blocks;
    uint32_t size = 0;
    if (live && kParse) {
      const uint8_t* const sum = body + 2 * at.blocks + 4 * block;
      size = body[2 * block] | static_cast<uint32_t>(body[2 * block + 1]) << 8;
      job.work.size[block] = size;
      job.work.sum[block] = sum[0] | static_cast<uint32_t>(sum[1]) << 8 |
                            static_cast<uint32_t>(sum[2]) << 16 |
                            static_cast<uint32_t>(sum[3]) << 24;
      const int64_t row0 = block / at.per_row * at.group, side = block % at.per_row;
      const int64_t rows = at.rows - row0 < at.group ? at.rows - row0 : at.group;
      const int64_t cols = side + 1 == at.per_row ? at.cols - side * kExactBlock : kExactBlock;
      bad = bad || size > rows * cols * elem;
    } else if (live) {
      size = job.work.size[block];
    }
    uint32_t total;
    const uint32_t mine = scan(size, warp_sum, &total);
    if (live) job.work.offset[block] = before + mine;
    before += total;
  }
  if (threadIdx.x == 0) *job.work.total = before;
  if (kParse) {
    bad = bad || before != static_cast<unsigned long long>(job.args.body_size);
    if (bad) note(job, -1, kMalformed);
  }
}

__global__ void status_kernel(const unsigned long long* fault, int64_t* status) {
  constexpr int64_t kStatus[4] = {0, static_cast<int64_t>(ExactStatus::malformed),
                                  static_cast<int64_t>(ExactStatus::not_finite),
                                  static_cast<int64_t>(ExactStatus::mismatch)};
  const unsigned long long found = *fault;
  const int what = found == ~0ull ? 0 : static_cast<int>(found % 8);
  status[0] = what == 0 ? kStatus[0] : what == 1 ? kStatus[1] : what == 2 ? kStatus[2] : kStatus[3];
  status[1] = found == ~0ull ? -1 : static_cast<int64_t>(found / 8) - 1;
}

Job make_job(const CudaExact& args) {
  Job job = {args, exact_layout(args.n, args.k), {}, false};
  uint8_t* p = static_cast<uint8_t*>(args.workspace);
  const int64_t blocks = job.at.blocks;
  job.work.fault = reinterpret_cast<unsigned long long*>(p);
  job.work.total = job.work.fault + 1;
  job.work.offset = job.work.fault + 2;
  job.work.size = reinterpret_cast<uint32_t*>(job.work.offset + blocks);
  job.work.sum = job.work.size + blocks;
  return job;
}

unsigned grid_of(const ExactLayout& at) {
  const int64_t groups = (at.rows + at.group - 1) / at.group;
  const int64_t high = at.group == 1 ? kRows : 1;
  return static_cast<unsigned>((groups + high - 1) / high * at.per_row);
}

template <bool kEncode>
void launch(Job job, bool write, cudaStream_t stream) {
  job.write = write;
  const unsigned grid = grid_of(job.at);
  if (grid == 0) return;
  if (job.args.weight_type == DType::f32) {
    auto* const kernel = exact_kernel<float, kEncode>;
    LK_LAUNCH(kernel, grid, kThreads, 0, stream, job);
  } else if (job.args.weight_type == DType::f16) {
    auto* const kernel = exact_kernel<f16, kEncode>;
    LK_LAUNCH(kernel, grid, kThreads, 0, stream, job);
  } else {
    auto* const kernel = exact_kernel<bf16, kEncode>;
    LK_LAUNCH(kernel, grid, kThreads, 0, stream, job);
  }
}

// Nothing is wrong so far, unless a factor is not finite.
cudaError_t begin(const Job& job, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(job.work.fault, 0xff, 8, stream);
  if (error != cudaSuccess) return error;
  if (job.at.blocks > 0) LK_LAUNCH(factors_kernel, 256u, kThreads, 0, stream, job);
  return cudaGetLastError();
}

template <class T>
cudaError_t fetch(T* to, const T* from, cudaStream_t stream) {
  const cudaError_t error = cudaMemcpyAsync(to, from, sizeof(T), cudaMemcpyDeviceToHost, stream);
  return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;
}

}  // namespace

extern "C" int64_t lk_cuda_exact_workspace(int64_t n, int64_t k) {
  return 16 + 16 * exact_layout(n, k).blocks;
}

extern "C" const char* lk_cuda_exact_measure(const CudaExact* merge, int64_t* body_size, int device,
                                             void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const Job job = make_job(*merge);
  *body_size = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = begin(job, on);
  if (error != cudaSuccess || job.at.blocks == 0) return words(error);
  launch<true>(job, false, on);
  error = cudaGetLastError();
  if (error != cudaSuccess) return words(error);
  auto* const kernel = offsets_kernel<false>;
  LK_LAUNCH(kernel, 1u, kScanThreads, 0, on, job, 0u);
  error = cudaGetLastError();
  unsigned long long fault = 0, total = 0;
  if (error == cudaSuccess) error = fetch(&fault, job.work.fault, on);
  if (error == cudaSuccess) error = fetch(&total, job.work.total, on);
  if (fault == ~0ull) *body_size = static_cast<int64_t>(total);
  return words(error);
}

extern "C" const char* lk_cuda_exact_write(const CudaExact* merge, int device, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return words(error);
  launch<true>(make_job(*merge), true, static_cast<cudaStream_t>(stream));
  return words(cudaGetLastError());
}

extern "C" const char* lk_cuda_exact_undo(const CudaExact* merge, int device, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const Job job = make_job(*merge);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = begin(job, on);
  if (error != cudaSuccess) return words(error);
  auto* const kernel = offsets_kernel<true>;
  const uint32_t elem = static_cast<uint32_t>(dtype_size(merge->weight_type));
  LK_LAUNCH(kernel, 1u, kScanThreads, 0, on, job, elem);
  error = cudaGetLastError();
  if (error != cudaSuccess) return words(error);
  launch<false>(job, false, on);
  error = cudaGetLastError();
  if (error != cudaSuccess) return words(error);
  launch<false>(job, true, on);
  return words(cudaGetLastError());
}

extern "C" const char* lk_cuda_exact_status(const CudaExact* merge, int64_t* status, bool* ok,
                                            int device, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const Job job = make_job(*merge);
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return words(error);
  LK_LAUNCH(status_kernel, 1u, 1u, 0, on, job.work.fault, status);
  error = cudaGetLastError();
  if (error == cudaSuccess && ok != nullptr) {
    unsigned long long fault = 0;
    error = fetch(&fault, job.work.fault, on);
    *ok = fault == ~0ull;
  }
  return words(error);
}
