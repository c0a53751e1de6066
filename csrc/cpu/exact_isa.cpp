// One work item of an exact merge, and the widening of the factors.
//
// The update of the item's rows and columns is computed first, into a buffer of float32: kRows x
// kCols accumulators run over the whole rank in registers, each a chain of fused multiply-adds from
// +0 in ascending order, which is the arithmetic the format fixes: long ranks are not cut. Then the
// item's blocks go through the codec one by one, in place, or in a copy where a block's weights do
// not touch: undone, merged, and put back as they were if something is wrong. What a merge records
// goes into one allocation an item.
#include "exact_isa.h"

#include <cstdlib>

#include "exact_codec.h"
#include "merge_isa.h"

namespace lora_kernels {
namespace LK_ISA {

namespace {

#if defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif
constexpr int kVecs = 2;
constexpr int kCols = kVecs * kN;
constexpr int kPad = 16;

// to[kRows][stride] = the update of a panel, t [rank][kRows]; `wide` columns of `tall` rows of it
// are wanted.
LK_INLINE void update_tile(const float* a, const float* t, int64_t rank, int64_t tall, int64_t wide,
                           float* to, int64_t stride) {
  fv acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int y = 0; y < kRows; ++y) acc[y][0] = acc[y][1] = fv{};
#pragma GCC unroll 4
  for (int64_t r = 0; r < rank; ++r, a += kCols, t += kRows) {
    const fv a0 = read<fv>(a), a1 = read<fv>(a + kN);
#pragma GCC unroll 8
    for (int y = 0; y < kRows; ++y) {
      const fv b = splat(t[y]);
      acc[y][0] = fused(b, a0, acc[y][0]);
      acc[y][1] = fused(b, a1, acc[y][1]);
    }
  }
  float part[kRows][kCols];
  const bool whole = tall >= kRows && wide >= kCols;
  float* at = whole ? to : part[0];
  const int64_t step = whole ? stride : kCols;
#pragma GCC unroll 8
  for (int y = 0; y < kRows; ++y) {
    write(at + y * step, acc[y][0]);
    write(at + y * step + kN, acc[y][1]);
  }
  if (whole) return;
  const size_t bytes = static_cast<size_t>(wide < kCols ? wide : kCols) * sizeof(float);
  for (int64_t y = 0; y < kRows && y < tall; ++y) std::memcpy(to + y * stride, part[y], bytes);
}

// What a unit's update covers: rows row0 .. row1 of columns col0 .. col1, which start a panel.
struct Span {
  int64_t row0, row1, col0, col1;
  int64_t stride;  // between the rows of its update
};

// Blocks of one row need not touch: rows that are a power of two apart share the sets of a cache.
Span unit_span(const ExactLayout& at, int64_t unit) {
  const int64_t side = unit / at.row_units, row0 = unit % at.row_units * at.unit_rows;
  Span s = {row0, row0 + at.unit_rows, side * kExactBlock, at.cols, 0};
  if (s.row1 > at.rows) s.row1 = at.rows;
  if (side + 1 < at.per_row) s.col1 = s.col0 + kExactBlock;
  s.stride = s.col1 - s.col0 + (at.group == 1 ? kPad : 0);
  return s;
}

// The cache lines of w that hold kCols columns of kRows rows.
void prefetch(const Matrix& w, int64_t row, int64_t col) {
  const int64_t size = dtype_size(w.dtype);
  const char* at = static_cast<const char*>(w.data) + (row * w.row_stride + col) * size;
  for (int y = 0; y < kRows; ++y) __builtin_prefetch(at + y * w.row_stride * size, 1, 3);
}

// out[rows][stride] = the update. W is fetched meanwhile: its rows are pages apart, where the
// hardware does not look ahead. `t` has room for kRows rows of the factor.
void update(const ExactTerm& term, const Matrix& w, const Span& span, float* t, float* out) {
  const int64_t rank = term.rank, rows = span.row1 - span.row0;
  for (int64_t i = 0; i < rows; i += kRows) {
    for (int y = 0; y < kRows; ++y) {
      const float* row = term.t + (span.row0 + (i + y < rows ? i + y : rows - 1)) * rank;
      for (int64_t r = 0; r < rank; ++r) t[r * kRows + y] = row[r];
    }
    for (int64_t j = span.col0; j < span.col1; j += kCols) {
      if (i + kRows <= rows) prefetch(w, span.row0 + i, j);
      update_tile(term.a + j * rank, t, rank, rows - i, span.col1 - j,
                  out + i * span.stride + j - span.col0, span.stride);
    }
  }
}

// A thread's buffers.
struct Scratch {
  float* t;                   // rows of a factor
  float *undo, *apply;        // updates of a unit
  uint8_t *copy, *was, *mid;  // a block's weights: a copy of them, as they were, undone
  uint8_t* bits;              // what is recorded of a block
  Queue* queue;
};

int64_t round_up(int64_t n) { return (n + 63) / 64 * 64; }

int64_t unit_width(const ExactLayout& at) { return at.per_row > 1 ? kExactMaxBlock : at.cols; }

Scratch make_scratch(const ExactJob& job) {
  const ExactLayout& at = job.layout;
  const int64_t block = round_up((kExactMaxBlock + 16) * dtype_size(job.w.dtype));
  const int64_t update_bytes = round_up(at.unit_rows * (unit_width(at) + kPad) * 4);
  int64_t rank = job.undo != nullptr ? job.undo->rank : 0;
  if (job.apply != nullptr && job.apply->rank > rank) rank = job.apply->rank;
  const int64_t t_bytes = round_up(rank * kRows * 4);
  uint8_t* p = static_cast<uint8_t*>(
      merge_scratch(static_cast<size_t>(t_bytes + 2 * update_bytes + 4 * block) + sizeof(Queue)));
  Scratch s;
  s.t = reinterpret_cast<float*>(p);
  s.undo = reinterpret_cast<float*>(p += t_bytes);
  s.apply = reinterpret_cast<float*>(p += update_bytes);
  s.copy = p += update_bytes;
  s.was = p += block;
  s.mid = p += block;
  s.bits = p += block;
  s.queue = reinterpret_cast<Queue*>(p + block);
  return s;
}

// The rows x cols weights at `from` and a buffer of them, side by side.
template <class T>
void gather(const T* from, const Matrix& w, int64_t rows, int64_t cols, T* to) {
  for (int64_t i = 0; i < rows; ++i, from += w.row_stride, to += cols) {
    if (w.col_stride == 1) {
      std::memcpy(static_cast<void*>(to), from, static_cast<size_t>(cols) * sizeof(T));
    } else {
      for (int64_t j = 0; j < cols; ++j) to[j] = from[j * w.col_stride];
    }
  }
}
template <class T>
void scatter(const T* from, const Matrix& w, int64_t rows, int64_t cols, T* to) {
  for (int64_t i = 0; i < rows; ++i, from += cols, to += w.row_stride) {
    if (w.col_stride == 1) {
      std::memcpy(static_cast<void*>(to), from, static_cast<size_t>(cols) * sizeof(T));
    } else {
      for (int64_t j = 0; j < cols; ++j) to[j * w.col_stride] = from[j];
    }
  }
}

// Adds `size` bytes to the chunk (malloc), which holds `held` and has room for `room`.
bool append(uint8_t** chunk, size_t* held, size_t* room, const uint8_t* from, size_t size) {
  if (*held + size > *room) {
    const size_t more = 2 * (*held + size) + 1024;
    void* const grown = std::realloc(*chunk, more);
    if (grown == nullptr) return false;
    *chunk = static_cast<uint8_t*>(grown);
    *room = more;
  }
  if (size > 0) std::memcpy(*chunk + *held, from, size);
  *held += size;
  return true;
}

// One block of n weights, in place: undone, merged, both. Where it is not ok, w is half done and
// s.was what it was.
template <class T>
ExactStatus run_block(const ExactJob& job, const Scratch& s, int64_t block, T* w, int64_t n,
                      const float* undo, const float* apply) {
  T* was = reinterpret_cast<T*>(s.was);
  if (job.undo != nullptr) {
    if (!decode(w, undo, n, block, job.undo_piece[block], was, *s.queue)) {
      return ExactStatus::mismatch;
    }
    was = reinterpret_cast<T*>(s.mid);
  }
  if (job.apply == nullptr) return ExactStatus::ok;
  ExactPiece* const piece = job.apply_piece != nullptr ? job.apply_piece + block : nullptr;
  const bool finite = encode(w, apply, n, block, was, s.bits, piece, *s.queue);
  return finite ? ExactStatus::ok : ExactStatus::not_finite;
}

template <class T>
ExactResult run_unit(const ExactJob& job, int64_t unit) {
  const ExactLayout& at = job.layout;
  const Scratch s = make_scratch(job);
  const Span span = unit_span(at, unit);
  const int64_t side = unit / at.row_units, cols = span.col1 - span.col0;
  if (job.undo != nullptr) update(*job.undo, job.w, span, s.t, s.undo);
  if (job.apply != nullptr) update(*job.apply, job.w, span, s.t, s.apply);

  size_t held = 0, room = 0;  // of the unit's chunk
  for (int64_t i = span.row0; i < span.row1; i += at.group) {
    const int64_t block = i / at.group * at.per_row + side;
    if (job.only_done && !job.done[block]) continue;
    const int64_t rows = span.row1 - i < at.group ? span.row1 - i : at.group, n = rows * cols;
    T* const home =
        static_cast<T*>(job.w.data) + i * job.w.row_stride + span.col0 * job.w.col_stride;
    const int64_t first = (i - span.row0) * span.stride;
    const bool flat =
        (job.w.col_stride == 1 || cols == 1) && (rows == 1 || job.w.row_stride == cols);
    T* const w = flat ? home : reinterpret_cast<T*>(s.copy);
    if (!flat) gather(home, job.w, rows, cols, w);
    ExactStatus status = run_block(job, s, block, w, n, s.undo + first, s.apply + first);
    if (status == ExactStatus::ok && job.apply_piece != nullptr &&
        !append(job.chunk + unit, &held, &room, s.bits, job.apply_piece[block].size)) {
      status = ExactStatus::no_memory;
    }
    if (status != ExactStatus::ok) {
      if (flat) std::memcpy(static_cast<void*>(w), s.was, static_cast<size_t>(n) * sizeof(T));
      return {status, status == ExactStatus::no_memory ? -1 : block};
    }
    if (!flat) scatter(w, job.w, rows, cols, home);
    job.done[block] = 1;
  }
  return {ExactStatus::ok, -1};
}

// Gives back the memory that the unit did not fill, and says where its pieces lie.
void trim_chunk(const ExactJob& job, int64_t unit) {
  const ExactLayout& at = job.layout;
  const int64_t first = unit % at.row_units * at.unit_rows / at.group;
  const int64_t side = unit / at.row_units, count = at.unit_rows / at.group;
  uint8_t* const from = job.chunk[unit];
  size_t size = 0, offset = 0;
  int64_t g = first;
  for (; g < first + count; ++g) {
    const int64_t block = g * at.per_row + side;
    if (block >= at.blocks || !job.done[block]) break;
    size += job.apply_piece[block].size;
  }
  if (from == nullptr) return;
  uint8_t* to = static_cast<uint8_t*>(std::realloc(from, size + 1));
  if (to == nullptr) to = from;
  job.chunk[unit] = to;
  for (int64_t i = first; i < g; ++i) {
    ExactPiece& piece = job.apply_piece[i * at.per_row + side];
    piece.data = to + offset;
    offset += piece.size;
  }
}

uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// out[n] = a part of a row of m; the largest magnitude in it, as bits.
template <class T>
uint32_t widen_strip(const T* from, int64_t stride, int64_t n, float* out) {
  uint32_t largest = 0;
  for (int64_t j = 0; j < n; ++j) {
    out[j] = to_float(from[j * stride]);
    largest = larger(largest, float_bits(out[j]) & 0x7fffffffu);
  }
  return largest;
}
uint32_t widen_row(const Matrix& m, int64_t row, int64_t col, int64_t n, float* out) {
  const auto strip = [&](const auto* data) {
    const auto* from = data + row * m.row_stride + col * m.col_stride;
    return m.col_stride == 1 ? widen_strip(from, 1, n, out)
                             : widen_strip(from, m.col_stride, n, out);
  };
  if (m.dtype == DType::f32) return strip(static_cast<const float*>(m.data));
  if (m.dtype == DType::bf16) return strip(static_cast<const bf16*>(m.data));
  return strip(static_cast<const f16*>(m.data));
}

}  // namespace

int exact_panel() { return kCols; }

ExactResult exact_unit(const ExactJob& job, int64_t unit) {
  const ExactResult result = job.w.dtype == DType::f32    ? run_unit<float>(job, unit)
                             : job.w.dtype == DType::bf16 ? run_unit<bf16>(job, unit)
                                                          : run_unit<f16>(job, unit);
  if (job.apply_piece != nullptr) trim_chunk(job, unit);
  return result;
}

bool exact_widen_a(const Matrix& a, int64_t panel, float* out) {
  const int64_t col0 = panel * kCols, cols = a.cols - col0 < kCols ? a.cols - col0 : kCols;
  uint32_t largest = 0;
  for (int64_t r = 0; r < a.rows; ++r, out += kCols) {
    largest = larger(widen_row(a, r, col0, cols, out), largest);
    for (int64_t j = cols; j < kCols; ++j) out[j] = 0.0f;
  }
  return largest < 0x7f800000u;
}

bool exact_widen_b(const Matrix& b, float scale, int64_t row, float* out) {
  const uint32_t largest = widen_row(b, row, 0, b.cols, out);
  for (int64_t r = 0; r < b.cols; ++r) out[r] = scale * out[r];
  return largest < 0x7f800000u;
}

}  // namespace LK_ISA
}  // namespace lora_kernels
