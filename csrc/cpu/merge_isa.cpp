// W += scale * B A in place, tile by tile: W is read once and written once.
//
// Columns are cut into blocks whose slice of A, packed, stays in the L2 cache; a block is a
// row of panels of kCols columns, and a panel holds kCols neighbouring values for each step of the
// rank. For kRows rows of W at a time the rows of B are packed, then each panel's tile of W is
// updated: kRows x kVecs accumulators in registers run over the whole rank in float32, and only
// then is W loaded, added to, rounded and stored, while the next rows' lines are being prefetched.
//   Float path: B is packed as fl(scale * b), the terms are one long rank, W + acc.
//   Dot path (W, A and B all bf16, vdpbf16ps): two steps of the rank an instruction; scaling a
//   bf16 b would round it, so each term's accumulator is scaled: W + (s0 * acc0 + s1 * acc1).
// Long ranks are summed in chunks. The sums meet in a buffer of one tile.
// Tiles that hang over the edge, and weights with no unit stride, go through a buffer of one tile.
#include "merge_isa.h"

#include <cstring>
#include <vector>

#include "lora_kernels/simd_pairs.h"

namespace lora_kernels {
namespace LK_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6, kVecs = 4;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 6, kVecs = 1;
#else
constexpr int kRows = 2, kVecs = 1;
#endif
constexpr int kCols = kVecs * kLanes;
constexpr int kUnitRows = kRows * 8;      // rows of one work item
constexpr int64_t kBlockBytes = 1 << 18;  // of packed A: a share of L2; long rows of W pay most
constexpr int64_t kChunk = 128;           // steps of the rank summed in one go: bounds the error
constexpr int64_t kGrainElems = 1 << 15;  // of W a thread

struct FloatPath {
  using Elem = float;
  static constexpr int kSteps = 1;  // of the rank in one element
  static LK_INLINE vf load_a(const float* p) { return load(p); }
  static LK_INLINE vf load_b(const float* p) { return broadcast(*p); }
  static LK_INLINE vf mac(vf a, vf b, vf acc) { return fma(a, b, acc); }
};

#ifdef LK_HAS_BF16_DOT
struct DotPath {
  using Elem = uint32_t;
  static constexpr int kSteps = 2;
  static LK_INLINE vb load_a(const uint32_t* p) {
    return load_pairs(reinterpret_cast<const bf16*>(p));
  }
  static LK_INLINE vb load_b(const uint32_t* p) { return broadcast_pair(*p); }
  static LK_INLINE vf mac(vb a, vb b, vf acc) { return dot(a, b, acc); }
};
#endif

// Steps of the packed rank: the first group, all of them, and the factor of each group's sums.
struct Groups {
  int64_t first, total;
  float scale[kMaxTerms];
};

template <class Path>
LK_INLINE void accumulate(vf acc[kRows][kVecs], const typename Path::Elem* a,
                          const typename Path::Elem* b, int64_t depth, int64_t ldb) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[i][v] = zero();
  }
  for (int64_t r = 0; r < depth; ++r, a += kCols, ++b) {
    decltype(Path::load_a(a)) av[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) av[v] = Path::load_a(a + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const auto bi = Path::load_b(b + i * ldb);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[i][v] = Path::mac(av[v], bi, acc[i][v]);
    }
  }
}

// sum = s * acc, or sum += s * acc.
template <bool kAdd>
LK_INLINE void spill(float* sum, const vf acc[kRows][kVecs], vf s) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* p = sum + i * kCols + v * kLanes;
      store(p, kAdd ? fma(s, acc[i][v], load(p)) : mul(s, acc[i][v]));
    }
  }
}

// w[kRows][kCols] += update; a[total][kCols], b[kRows][total]. kMany: the rank takes several
// chunks.
template <class Path, class T, bool kMany>
LK_INLINE void tile(T* w, int64_t ldw, const typename Path::Elem* a, const typename Path::Elem* b,
                    const Groups& groups) {
  vf acc[kRows][kVecs];
  float sum[kMany ? kRows * kCols : 1];  // of the chunks before the last
  vf s = broadcast(groups.scale[0]);
  int64_t end = groups.first;
  int64_t at = kMany && end > kChunk ? kChunk : end;
  accumulate<Path>(acc, a, b, at, groups.total);
  if (kMany) {
    spill<false>(sum, acc, s);
    while (true) {
      if (at == groups.first) {
        s = broadcast(groups.scale[1]);
        end = groups.total;
      }
      const int64_t n = end - at < kChunk ? end - at : kChunk;
      accumulate<Path>(acc, a + at * kCols, b + at, n, groups.total);
      at += n;
      if (at == groups.total) break;
      spill<true>(sum, acc, s);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    vf u[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const vf old = load(w + i * ldw + v * kLanes);
      if (kMany) {
        u[v] = add(old, fma(s, acc[i][v], load(sum + i * kCols + v * kLanes)));
      } else {
        u[v] = fma(s, acc[i][v], old);
      }
    }
    store_row(w + i * ldw, u);
  }
}

// One cache line at a time: the lines of a tile's rows, for writing.
template <class T>
LK_INLINE void prefetch(const T* w, int64_t ldw) {
  for (int i = 0; i < kRows; ++i) {
    for (int c = 0; c < kCols; c += static_cast<int>(64 / sizeof(T))) {
      __builtin_prefetch(w + i * ldw + c, 1, 3);
    }
  }
}

// The tile of w that starts at row i, column j, through a buffer; rows x cols of it exist.
template <class Path, class T, bool kMany>
void edge_tile(const Matrix& w, int64_t i, int64_t j, int64_t rows, int64_t cols,
               const typename Path::Elem* a, const typename Path::Elem* b, const Groups& groups) {
  T buffer[kRows * kCols] = {};
  T* at = static_cast<T*>(w.data) + i * w.row_stride + j * w.col_stride;
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t x = 0; x < cols; ++x) {
      buffer[y * kCols + x] = at[y * w.row_stride + x * w.col_stride];
    }
  }
  tile<Path, T, kMany>(buffer, kCols, a, b, groups);
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t x = 0; x < cols; ++x) {
      at[y * w.row_stride + x * w.col_stride] = buffer[y * kCols + x];
    }
  }
}

// ---- packing: A into panels [total][kCols], B into rows [total] ----

// dst[n] = m[i][j : j + n] as float.
template <class T>
LK_INLINE void widen_row(float* dst, const T* src, int64_t n) {
  int64_t x = 0;
  for (; x + kLanes <= n; x += kLanes) store(dst + x, load(src + x));
  for (; x < n; ++x) dst[x] = to_float(src[x]);
}
inline void float_row(float* dst, const Matrix& m, int64_t i, int64_t j, int64_t n) {
  const int64_t at = i * m.row_stride + j * m.col_stride;
  if (m.col_stride != 1) {
    for (int64_t x = 0; x < n; ++x) dst[x] = element(m, i, j + x);
  } else if (m.dtype == DType::f32) {
    widen_row(dst, static_cast<const float*>(m.data) + at, n);
  } else if (m.dtype == DType::bf16) {
    widen_row(dst, static_cast<const bf16*>(m.data) + at, n);
  } else {
    widen_row(dst, static_cast<const f16*>(m.data) + at, n);
  }
}

// The scaling always goes to the caller's B, so that the layout of W changes no bit of the result.
inline void scale_row(float* dst, float scale, int64_t n) {
  for (int64_t x = 0; x < n; ++x) dst[x] *= scale;
}

// One panel: columns j .. j + n (n <= kCols, the rest zero).
inline void pack_panel(float* dst, const MergeJob& job, int64_t j, int64_t n) {
  for (int t = 0; t < job.num_terms; ++t) {
    const Matrix& a = job.terms[t].a;
    for (int64_t r = 0; r < a.rows; ++r, dst += kCols) {
      float_row(dst, a, r, j, n);
      if (job.transposed) scale_row(dst, job.terms[t].scale, n);
      for (int64_t x = n; x < kCols; ++x) dst[x] = 0.0f;
    }
  }
}

// Row i of every term's B, one after the other.
inline void pack_row(float* dst, const MergeJob& job, int64_t i) {
  for (int t = 0; t < job.num_terms; ++t) {
    const Matrix& b = job.terms[t].b;
    float_row(dst, b, i, 0, b.cols);
    if (!job.transposed) scale_row(dst, job.terms[t].scale, b.cols);
    dst += b.cols;
  }
}

#ifdef LK_HAS_BF16_DOT
inline void pack_panel(uint32_t* dst, const MergeJob& job, int64_t j, int64_t n) {
  for (int t = 0; t < job.num_terms; ++t) {
    const Matrix& a = job.terms[t].a;
    const int64_t step = a.col_stride;
    const bf16* row = static_cast<const bf16*>(a.data) + j * step;
    for (int64_t r = 0; r < a.rows; r += 2, dst += kCols, row += 2 * a.row_stride) {
      const bf16* next = row + a.row_stride;
      const bool pair = r + 1 < a.rows;
      for (int64_t x = 0; x < n; ++x) dst[x] = row[x * step].bits;
      for (int64_t x = 0; pair && x < n; ++x) {
        dst[x] |= static_cast<uint32_t>(next[x * step].bits) << 16;
      }
      for (int64_t x = n; x < kCols; ++x) dst[x] = 0;
    }
  }
}

inline void pack_row(uint32_t* dst, const MergeJob& job, int64_t i) {
  for (int t = 0; t < job.num_terms; ++t) {
    const Matrix& b = job.terms[t].b;
    const bf16* row = static_cast<const bf16*>(b.data) + i * b.row_stride;
    bf16* out = reinterpret_cast<bf16*>(dst);
    if (b.col_stride == 1) {
      std::memcpy(static_cast<void*>(out), row, static_cast<size_t>(b.cols) * sizeof(bf16));
    } else {
      for (int64_t r = 0; r < b.cols; ++r) out[r] = row[r * b.col_stride];
    }
    if (b.cols % 2 != 0) out[b.cols].bits = 0;
    dst += (b.cols + 1) / 2;
  }
}
#endif

// ---- the loops ----

template <class Path>
Groups make_groups(const MergeJob& job) {
  Groups g = {0, 0, {1.0f, 1.0f}};
  for (int t = 0; t < job.num_terms; ++t) {
    g.total += (job.terms[t].a.rows + Path::kSteps - 1) / Path::kSteps;
    if (Path::kSteps > 1) g.scale[t] = job.terms[t].scale;
    if (t == 0 || Path::kSteps == 1) g.first = g.total;
  }
  return g;
}

// One merge cut into items, each a block of columns of kUnitRows rows; a thread may do any run of
// them. Block-major: it keeps its packed A while it walks down the rows.
struct Cut {
  const MergeJob* job;
  Groups groups;
  int64_t panels, per_block, units, items;
  void (*work)(const Cut& cut, int64_t begin, int64_t end);
  int64_t item_elems() const { return per_block * kCols * kUnitRows; }
};

template <class Path, class T, bool kMany>
void work(const Cut& cut, int64_t begin, int64_t end) {
  using Elem = typename Path::Elem;
  const MergeJob& job = *cut.job;
  const Groups& groups = cut.groups;
  const Matrix& w = job.w;
  const int64_t panel_elems = groups.total * kCols;
  Elem* a = static_cast<Elem*>(
      merge_scratch(static_cast<size_t>(cut.per_block * panel_elems + kRows * groups.total) * 4));
  Elem* b = a + cut.per_block * panel_elems;
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / cut.units, row0 = item % cut.units * kUnitRows;
    const int64_t first = block * cut.per_block;
    const int64_t last = first + cut.per_block < cut.panels ? first + cut.per_block : cut.panels;
    if (packed != block) {
      for (int64_t p = first; p < last; ++p) {
        const int64_t left = w.cols - p * kCols;
        pack_panel(a + (p - first) * panel_elems, job, p * kCols, left < kCols ? left : kCols);
      }
      packed = block;
    }
    const int64_t row1 = row0 + kUnitRows < w.rows ? row0 + kUnitRows : w.rows;
    for (int64_t i = row0; i < row1; i += kRows) {
      const int64_t rows = row1 - i < kRows ? row1 - i : kRows;
      if (rows < kRows) std::memset(b, 0, static_cast<size_t>(kRows * groups.total) * 4);
      for (int64_t y = 0; y < rows; ++y) pack_row(b + y * groups.total, job, i + y);
      for (int64_t p = first; p < last; ++p) {
        const int64_t j = p * kCols;
        const int64_t cols = w.cols - j < kCols ? w.cols - j : kCols;
        const Elem* panel = a + (p - first) * panel_elems;
        if (rows == kRows && cols == kCols && w.col_stride == 1) {
          T* at = static_cast<T*>(w.data) + i * w.row_stride + j;
          prefetch(at + kRows * w.row_stride, w.row_stride);
          tile<Path, T, kMany>(at, w.row_stride, panel, b, groups);
        } else {
          edge_tile<Path, T, kMany>(w, i, j, rows, cols, panel, b, groups);
        }
      }
    }
  }
}

template <class Path, class T>
Cut cut(const MergeJob& job) {
  Cut c;
  c.job = &job;
  c.groups = make_groups<Path>(job);
  c.panels = (job.w.cols + kCols - 1) / kCols;
  int64_t per_block = kBlockBytes / (c.groups.total * kCols * 4);
  per_block = per_block < 1 ? 1 : per_block > c.panels ? c.panels : per_block;
  const int64_t blocks = (c.panels + per_block - 1) / per_block;
  c.per_block = (c.panels + blocks - 1) / blocks;
  c.units = (job.w.rows + kUnitRows - 1) / kUnitRows;
  c.items = blocks * c.units;
  const bool many = c.groups.first < c.groups.total || c.groups.total > kChunk;
  c.work = many ? &work<Path, T, true> : &work<Path, T, false>;
  return c;
}

#ifdef LK_HAS_BF16_DOT
bool all_bf16(const MergeJob& job) {
  bool all = job.w.dtype == DType::bf16;
  for (int t = 0; t < job.num_terms; ++t) {
    all = all && job.terms[t].a.dtype == DType::bf16 && job.terms[t].b.dtype == DType::bf16;
  }
  return all;
}
#endif

Cut cut(const MergeJob& job) {
#ifdef LK_HAS_BF16_DOT
  if (all_bf16(job)) return cut<DotPath, bf16>(job);
#endif
  if (job.w.dtype == DType::f32) return cut<FloatPath, float>(job);
  if (job.w.dtype == DType::bf16) return cut<FloatPath, bf16>(job);
  return cut<FloatPath, f16>(job);
}

}  // namespace

// All jobs are one run of elements, of which each thread takes a share: the items that start in it.
void merge_jobs(const MergeJob* jobs, size_t count) {
  std::vector<Cut> cuts;
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    cuts.push_back(cut(jobs[i]));
    total += cuts[i].items * cuts[i].item_elems();
  }
  parallel_for(total, kGrainElems, [&](int64_t begin, int64_t end) {
    for (const Cut& c : cuts) {
      const int64_t each = c.item_elems(), whole = c.items * each;
      const int64_t from = begin < 0 ? 0 : (begin + each - 1) / each;
      const int64_t to = end < 0 ? 0 : end < whole ? (end + each - 1) / each : c.items;
      if (from < to) c.work(c, from, to);
      begin -= whole;
      end -= whole;
    }
  });
}

}  // namespace LK_ISA
}  // namespace lora_kernels
