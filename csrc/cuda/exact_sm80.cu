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

#include "exact_element.h"
#include "load_adapter.h"
#include "lora_kernels/cuda_exact.h"
#include "lora_kernels/exact.h"
#include "lora_kernels/exact_layout.h"

namespace {

using namespace lora_kernels;
using exact::Interval;
using exact::Number;

constexpr int kThreads = 256, kBlocks = 2;
constexpr int kOwn = 8;    // neighbouring weights of a thread, in each half of a block
constexpr int kRows = 4;   // blocks of a thread block
constexpr int kSlots = 4;  // halves of blocks whose updates are summed at once
constexpr int kHalf = kThreads * kOwn;
static_assert(kHalf == kExactBlock, "a block has two halves at most");
constexpr int kScanThreads = 256;

// Where a weight's results lie; all in the workspace.
struct Work {
  unsigned long long* fault;   // the smallest found, all ones where there is none
  unsigned long long* total;   // bytes of the body
  unsigned long long* offset;  // of a block's bytes in the body
  uint32_t* size;
  uint32_t* sum;
};

struct Job {
  CudaExact args;
  ExactLayout at;
  Work work;
  bool write;  // or only find out
};

enum : unsigned { kMalformed = 1, kNotFinite = 2, kMismatch = 3 };  // the smaller wins

__device__ void note(const Job& job, int64_t block, unsigned what) {
  atomicMin(job.work.fault, static_cast<unsigned long long>((block + 1) * 8 + what));
}
__device__ bool faulty(const Job& job) { return *job.work.fault != ~0ull; }

// One block of weights: where it lies and how many they are.
template <class T>
struct Place {
  T* home;
  int64_t row_stride, col_stride;
  int64_t block, row0, col0;
  int cols, count;

  __device__ Place(const Job& job, int64_t group, int64_t side) {
    const ExactLayout& at = job.at;
    block = group * at.per_row + side;
    row0 = group * at.group;
    col0 = side * kExactBlock;
    cols = static_cast<int>(side + 1 == at.per_row ? at.cols - col0 : kExactBlock);
    const int64_t left = at.rows - row0;
    count = static_cast<int>(left < at.group ? left : at.group) * cols;
    row_stride = job.args.weight_row;
    col_stride = job.args.weight_col;
    home = static_cast<T*>(job.args.weight) + row0 * row_stride + col0 * col_stride;
  }
  __device__ T* at(int p) const {
    return p < cols ? home + p * col_stride
                    : home + (p / cols) * row_stride + (p % cols) * col_stride;
  }
  __device__ uint32_t bits(int p) const { return Number<T>::bits(*at(p)); }
};

// Position of weight p's update in shared memory: a thread's eight do not share a bank.
__device__ int spread(int p) { return p + p / kOwn; }

constexpr int kUpdates = 2 * kHalf + 2 * kHalf / kOwn;

struct Shared {
  float update[kUpdates];
  uint32_t bytes[kExactMaxBlock + 1];  // of the residual, as words: 4 bytes a weight at most
  uint32_t warp_sum[kThreads / 32];
  uint32_t lane[16];
  bool stop;
};

// Sums the updates of the thread's weights in `rows` blocks of one row each, below one another.
// Slot y * kHalves + h is half h of block y.
template <int kHalves>
__device__ void sum_wide(const CudaTerm& term, int64_t row0, int rows, int64_t col0, int cols,
                         float (&acc)[kSlots][kOwn]) {
  constexpr int kHigh = kSlots / kHalves;
  const float scale = *term.scaling;
#pragma unroll 1
  for (int64_t r = 0; r < term.r; ++r) {
    float t[kHigh];
#pragma unroll
    for (int y = 0; y < kHigh; ++y) {
      const int64_t row = row0 + (y < rows ? y : rows - 1);
      t[y] = exact::factor(load_adapter(term.b, term.b_type, row * term.b_row + r * term.b_col),
                           scale);
    }
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const int p = h * kHalf + static_cast<int>(threadIdx.x) * kOwn;
      if (p >= cols) continue;
      float a[kOwn];
      const int live = cols - p < kOwn ? cols - p : kOwn;
      load_adapter_strip(term.a, term.a_type, r * term.a_row + (col0 + p) * term.a_col, term.a_col,
                         live, a);
#pragma unroll
      for (int y = 0; y < kHigh; ++y) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          acc[y * kHalves + h][j] = exact::step(acc[y * kHalves + h][j], t[y], a[j]);
        }
      }
    }
  }
}

// The same for one block of several rows: its halves are slots 0 and 1.
__device__ void sum_narrow(const CudaTerm& term, int64_t row0, int cols, int count,
                           float (&acc)[kSlots][kOwn]) {
  const float scale = *term.scaling;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int p = h * kHalf + static_cast<int>(threadIdx.x) * kOwn + j;
      if (p >= count) continue;
      const int64_t row = row0 + p / cols, col = p % cols;
#pragma unroll 1
      for (int64_t r = 0; r < term.r; ++r) {
        const float b = load_adapter(term.b, term.b_type, row * term.b_row + r * term.b_col);
        const float a = load_adapter(term.a, term.a_type, r * term.a_row + col * term.a_col);
        acc[h][j] = exact::step(acc[h][j], exact::factor(b, scale), a);
      }
    }
  }
}

// Sum of the values of the threads before this one; *all is that of all. Every thread takes part.
__device__ uint32_t scan(uint32_t value, uint32_t* warp_sum, uint32_t* all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = value;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, sum, by);
    if (lane >= by) sum += other;
  }
  if (lane == 31) warp_sum[warp] = sum;
  __syncthreads();
  uint32_t before = 0, total = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) before += warp_sum[i];
    total += warp_sum[i];
  }
  __syncthreads();
  *all = total;
  return before + sum - value;
}

// The checksum of a block whose weights are `merged(p)`, of its words `word(i)`. The result is
// thread 0's.
template <class Merged, class Word>
__device__ uint32_t checksum(int64_t block, int count, uint32_t words, uint32_t* lanes,
                             const Merged& merged, const Word& word) {
  if (threadIdx.x < 16) {
    uint32_t lane = exact::lane_start(block, static_cast<int>(threadIdx.x));
#pragma unroll 4
    for (int p = static_cast<int>(threadIdx.x); p - static_cast<int>(threadIdx.x) < count;
         p += 16) {
      lane = exact::mix(lane ^ (p < count ? merged(p) : 0u));
    }
    lanes[threadIdx.x] = lane;
  }
  __syncthreads();
  uint32_t sum = static_cast<uint32_t>(count);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 16; ++i) sum = exact::mix(sum ^ lanes[i]);
    for (uint32_t i = 0; i < words; ++i) sum = exact::mix(sum ^ word(i));
  }
  __syncthreads();
  return sum;
}

// Measures the block, or (job.write) records it and writes the merged weights.
template <class T>
__device__ void encode(const Job& job, const Place<T>& at, Shared& shared) {
  const int halves = at.count > kHalf ? 2 : 1;
  const uint32_t raw = static_cast<uint32_t>(at.count) * sizeof(T);
  const uint32_t max_words = (raw + 3) / 4;
  for (uint32_t i = threadIdx.x; i <= max_words; i += kThreads) shared.bytes[i] = 0;
  __syncthreads();

  // The interval of weight p where it has more than one key.
  const auto interval_of = [&](int p, uint32_t bits, bool* bad) {
    const float w = Number<T>::value(bits), acc = shared.update[spread(p)];
    const float u = __fadd_rn(w, acc);
    const uint32_t m = Number<T>::round(u);
    *bad = *bad || exact::too_big<T>(u);
    Interval found = {0, 0};
    if (exact::too_big<T>(u) || exact::surely_unique<T>(w, Number<T>::value(m), acc, u)) {
      return found;
    }
    return exact::interval<T>(exact::key_of<T>(m), acc);
  };

  bool bad = false;
  uint32_t all = 0;
#pragma unroll 1
  for (int h = 0; h < halves; ++h) {
    const int first = h * kHalf + static_cast<int>(threadIdx.x) * kOwn;
    uint32_t mine = 0;
#pragma unroll 1
    for (int p = first; p < first + kOwn && p < at.count; ++p) {
      mine += static_cast<uint32_t>(interval_of(p, at.bits(p), &bad).width());
    }
    uint32_t total;
    uint32_t bit = all + scan(mine, shared.warp_sum, &total);
    all += total;
    if (mine == 0) continue;
#pragma unroll 1
    for (int p = first; p < first + kOwn && p < at.count; ++p) {
      const uint32_t bits = at.bits(p);
      const Interval found = interval_of(p, bits, &bad);
      const int width = found.width();
      if (width == 0) continue;
      const uint32_t index =
          static_cast<uint32_t>(exact::key_of<T>(bits)) - static_cast<uint32_t>(found.lo);
      const uint64_t placed = static_cast<uint64_t>(index) << (bit & 31);
      atomicOr(&shared.bytes[bit / 32], static_cast<uint32_t>(placed));
      if (placed >> 32) {
        atomicOr(&shared.bytes[bit / 32 + 1], static_cast<uint32_t>(placed >> 32));
      }
      bit += static_cast<uint32_t>(width);
    }
  }
  if (bad) note(job, at.block, kNotFinite);
  __syncthreads();
  uint32_t size = (all + 7) / 8;
  if (size >= raw) {
    // The weights themselves are not longer.
    size = raw;
    for (uint32_t i = threadIdx.x; i <= max_words; i += kThreads) shared.bytes[i] = 0;
    __syncthreads();
    for (int p = static_cast<int>(threadIdx.x); p < at.count; p += kThreads) {
      if constexpr (sizeof(T) == 4) {
        shared.bytes[p] = at.bits(p);
      } else {
        atomicOr(&shared.bytes[p / 2], at.bits(p) << (16 * (p % 2)));
      }
    }
  }
  __syncthreads();

  const auto merged_bits = [&](int p) {
    const float w = Number<T>::value(at.bits(p));
    return Number<T>::round(__fadd_rn(w, shared.update[spread(p)]));
  };
  if (job.write) {
    uint8_t* const body = job.args.body;
    if (body != nullptr) {
      uint8_t* const to = body + job.work.offset[at.block];
      for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
        to[i] = static_cast<uint8_t>(shared.bytes[i / 4] >> (8 * (i % 4)));
      }
      if (threadIdx.x == 0) {
        const uint32_t sum = job.work.sum[at.block];
        uint8_t* const table = body + 2 * job.at.blocks + 4 * at.block;
        for (int b = 0; b < 2; ++b) {
          body[2 * at.block + b] = static_cast<uint8_t>(size >> (8 * b));
        }
        for (int b = 0; b < 4; ++b) table[b] = static_cast<uint8_t>(sum >> (8 * b));
      }
    }
    for (int p = static_cast<int>(threadIdx.x); p < at.count; p += kThreads) {
      *at.at(p) = Number<T>::make(merged_bits(p));
    }
  } else {
    const uint32_t sum = checksum(at.block, at.count, (size + 3) / 4, shared.lane, merged_bits,
                                  [&](uint32_t i) { return shared.bytes[i]; });
    if (threadIdx.x == 0) {
      job.work.size[at.block] = size;
      job.work.sum[at.block] = sum;
    }
  }
}

// Checks the block against its bytes, or (job.write) restores the weights.
template <class T>
__device__ void decode(const Job& job, const Place<T>& at, Shared& shared) {
  const uint8_t* const bytes = job.args.body + job.work.offset[at.block];
  const uint32_t size = job.work.size[at.block];
  if (!job.write) {
    const auto word = [&](uint32_t i) {
      uint32_t v = 0;
      for (uint32_t b = 0; b < 4; ++b) {
        if (4 * i + b < size) v |= static_cast<uint32_t>(bytes[4 * i + b]) << (8 * b);
      }
      return v;
    };
    const uint32_t sum = checksum(
        at.block, at.count, (size + 3) / 4, shared.lane, [&](int p) { return at.bits(p); }, word);
    if (threadIdx.x == 0 && sum != job.work.sum[at.block]) note(job, at.block, kMismatch);
  }

  const bool raw = size == static_cast<uint32_t>(at.count) * sizeof(T);
  if (raw) {
    for (int p = static_cast<int>(threadIdx.x); p < at.count; p += kThreads) {
      uint32_t w = 0;
      for (uint32_t b = 0; b < sizeof(T); ++b) {
        w |= static_cast<uint32_t>(bytes[p * sizeof(T) + b]) << (8 * b);
      }
      if (job.write) {
        *at.at(p) = Number<T>::make(w);
      } else {
        const int32_t m = exact::merged<T>(exact::key_of<T>(w), shared.update[spread(p)]);
        if (m != exact::key_of<T>(at.bits(p))) note(job, at.block, kMismatch);
      }
    }
    return;
  }

  const int halves = at.count > kHalf ? 2 : 1;
  // The interval of the weight that merged to m, or the one key that is surely it.
  const auto interval_of = [&](int p, uint32_t m) {
    const float value = Number<T>::value(m), acc = shared.update[spread(p)];
    const uint32_t guess = Number<T>::round(__fadd_rn(value, -acc));
    const float w = Number<T>::value(guess);
    if (exact::surely_unique<T>(w, value, acc, __fadd_rn(w, acc))) {
      const int32_t key = exact::key_of<T>(guess);
      return Interval{key, key};
    }
    return exact::interval<T>(exact::key_of<T>(m), acc);
  };
  bool bad = false;
  uint32_t all = 0;
#pragma unroll 1
  for (int h = 0; h < halves; ++h) {
    const int first = h * kHalf + static_cast<int>(threadIdx.x) * kOwn;
    uint32_t mine = 0;
#pragma unroll 1
    for (int p = first; p < first + kOwn && p < at.count; ++p) {
      const Interval found = interval_of(p, at.bits(p));
      bad = bad || found.empty();
      mine += static_cast<uint32_t>(found.empty() ? 0 : found.width());
    }
    uint32_t total;
    uint32_t bit = all + scan(mine, shared.warp_sum, &total);
    all += total;
    bad = bad || bit + mine > size * 8;
    if (bad) continue;
#pragma unroll 1
    for (int p = first; p < first + kOwn && p < at.count; ++p) {
      const Interval found = interval_of(p, at.bits(p));
      const int width = found.width();
      uint64_t window = 0;
      for (uint32_t b = 0; 8 * b < (bit & 7) + static_cast<uint32_t>(width); ++b) {
        window |= static_cast<uint64_t>(bytes[bit / 8 + b]) << (8 * b);
      }
      const uint32_t index =
          static_cast<uint32_t>(window >> (bit & 7) & ((uint64_t{1} << width) - 1));
      bit += static_cast<uint32_t>(width);
      const int64_t key = int64_t{found.lo} + index;
      bad = bad || index > found.range() || key <= -int64_t{Number<T>::kInf} - 1 ||
            key >= Number<T>::kInf;
      if (job.write) {
        *at.at(p) = Number<T>::make(exact::bits_of<T>(static_cast<int32_t>(key)));
      }
    }
  }
  if (bad || (threadIdx.x == 0 && (all + 7) / 8 != size)) note(job, at.block, kMismatch);
}

// A column of blocks: the updates of as many as there are slots for, then the codec over each.
template <class T, bool kEncode>
__global__ void __launch_bounds__(kThreads, kBlocks) exact_kernel(const __grid_constant__ Job job) {
  __shared__ Shared shared;
  // One thread looks, for all to agree: other blocks may find something at this moment.
  if (threadIdx.x == 0) shared.stop = faulty(job);
  __syncthreads();
  if (shared.stop) return;
  const ExactLayout& at = job.at;
  const bool wide = at.group == 1;
  const int64_t groups = (at.rows + at.group - 1) / at.group;
  const int64_t side = blockIdx.x % at.per_row;
  const int64_t first = blockIdx.x / at.per_row * (wide ? kRows : 1);
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
  const auto finite = [](float v) { return exact::magnitude(v) < 0x7f800000u; };
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

const char* words(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
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
