// What the kernels on tiles share: sums of products of two bf16 operands, 32 x 32 at a time.
//
// The rows of the first operand are contiguous along the sum and are read where they lie: a tile is
// 16 rows of 32 numbers. Its last numbers, where they fill no tile, are copied next to zeros first,
// and so are fewer than 16 rows, rows that are picked from a list, and rows with a dropout mask.
//
// The second operand is packed, 16 of its columns after the other, as the instruction wants it:
// [step of 32][16 pairs along the sum][16 columns][2]. From columns that are contiguous along the
// sum by a transpose of 16 x 16 pairs, from rows by interleaving two of them.
//
// Every sum is one element of one tile over the whole of its length, in steps of 32: it depends on
// neither its neighbours nor how work is split.
#pragma once

#include <type_traits>

#include "linear_jobs.h"
#include "lora_kernels/tiles.h"

namespace lora_kernels {
namespace LK_ISA {

LK_INLINE int64_t steps_of(int64_t K) { return (K + kStep - 1) / kStep; }
LK_INLINE int64_t whole(int64_t n, int64_t size) { return (n + size - 1) / size * size; }

// Sixteen rows of the first operand: whole steps `next` numbers apart, and the padded rest.
struct Rows {
  const bf16* first;
  int64_t stride;  // bytes
  int64_t next;
  const bf16* rest;
};

// Where sixteen rows come from; `list` and `mask` may be null.
struct RowSource {
  const bf16* x;
  int64_t stride;
  const int32_t* list;
  const uint8_t* mask;
  int64_t mask_stride;
  int64_t row(int64_t i) const { return list ? list[i] : i; }
};

// Row `row` at [k, k + n), n <= 32, the rest zero.
LK_INLINE vb load_row(const RowSource& s, int64_t row, int64_t k, int n) {
  const bf16* p = s.x + row * s.stride + k;
  const vb v = n == kStep ? load_pairs(p) : load_pairs_n(p, n);
  return s.mask == nullptr ? v : keep(v, load_bits(s.mask + row * s.mask_stride + k / 8, n));
}

// Rows [i, i + count), count <= 16, of K numbers. `rest` has room for a tile, `copy` for
// steps_of(K) of them.
inline Rows take_rows(const RowSource& s, int64_t i, int count, int64_t K, bf16* rest, bf16* copy) {
  const vb none = as_pairs(zero());
  const int left = static_cast<int>(K % kStep);
  if (count == kSide && s.list == nullptr && s.mask == nullptr) {
    for (int j = 0; left > 0 && j < kSide; j++) {
      store_pairs(rest + j * kStep, load_row(s, i + j, K - left, left));
    }
    return {s.x + i * s.stride, 2 * s.stride, kStep, rest};
  }
  for (int j = 0; j < kSide; j++) {
    const int64_t row = j < count ? s.row(i + j) : 0;
    for (int64_t k = 0; k < K; k += kStep) {
      store_pairs(copy + k / kStep * kTile + j * kStep,
                  j < count ? load_row(s, row, k, clip(K - k, kStep)) : none);
    }
  }
  return {copy, kTileRowBytes, kTile, copy + K / kStep * kTile};
}

// `count` rows of floats, scaled, rounded to bf16 and padded, as packed tiles; count <= 16.
template <class Row>
inline Rows narrow_rows(const Row& row, int count, int64_t K, float scale, bf16* copy) {
  const vf s = broadcast(scale);
  for (int j = 0; j < kSide; j++) {
    const float* h = j < count ? row(j) : nullptr;
    for (int64_t k = 0; k < K; k += kStep) {
      const int left = clip(K - k, kStep);
      vf lo = zero(), hi = zero();
      if (h != nullptr) {
        lo = load_n(h + k, clip(left, kLanes));
        if (left > kLanes) hi = load_n(h + k + kLanes, left - kLanes);
      }
      store_pairs(copy + k / kStep * kTile + j * kStep, narrow_pairs(mul(s, lo), mul(s, hi)));
    }
  }
  return {copy, kTileRowBytes, kTile, copy + K / kStep * kTile};
}

// Sixteen vectors of 16 pairs, one a column, as the 16 rows of pairs of a tile.
LK_INLINE void store_turned(vf (&t)[16], bf16* out) {
  transpose16(t);
  for (int i = 0; i < 16; i++) store_pairs(out + i * kStep, as_pairs(t[i]));
}

// Columns [n0, n0 + cols), cols <= 16, that are contiguous along the sum, of K numbers.
inline void pack_columns(const bf16* b, int64_t stride, int64_t n0, int cols, int64_t K,
                         bf16* out) {
  for (int64_t k = 0; k < K; k += kStep, out += kTile) {
    const int left = clip(K - k, kStep);
    vf t[16];
    for (int i = 0; i < 16; i++) {
      const bf16* p = b + (n0 + i) * stride + k;
      t[i] = i >= cols      ? zero()
             : left < kStep ? as_floats(load_pairs_n(p, left))
                            : as_floats(load_pairs(p));
    }
    store_turned(t, out);
  }
}

// Columns [n0, n1) of the contiguous rows [first, first + K): packed blocks of 16, `apart` numbers
// from one another. Row by row, as memory likes it best.
inline void pack_row_pairs(const RowSource& s, int64_t n0, int64_t n1, int64_t first, int64_t K,
                           bf16* out, int64_t apart) {
  const vb none = as_pairs(zero());
  for (int64_t k = 0; k < whole(K, kStep); k += 2) {
    const int64_t even = k < K ? s.row(first + k) : -1;
    const int64_t odd = k + 1 < K ? s.row(first + k + 1) : -1;
    bf16* p = out + k / kStep * kTile + k % kStep * kSide;
    for (int64_t n = n0; n < n1; n += 2 * kSide, p += 2 * apart) {
      const int cols = clip(n1 - n, 2 * kSide);
      vb lo, hi;
      interleave(even < 0 ? none : load_row(s, even, n, cols),
                 odd < 0 ? none : load_row(s, odd, n, cols), &lo, &hi);
      store_pairs(p, lo);
      if (cols > kSide) store_pairs(p + apart, hi);
    }
  }
}

// The sums of P x Q tiles, P and Q 1 or 2, are the tiles 0 to 3; 4, 5 and 6, 7 are the operands.
template <int P, int Q>
LK_INLINE void zero_sums() {
  tile_zero<0>();
  if (Q > 1) tile_zero<1>();
  if (P > 1) tile_zero<2>();
  if (P > 1 && Q > 1) tile_zero<3>();
}

constexpr int64_t kSumStride = 2 * kSide;  // floats in a row of stored sums

template <int P, int Q>
LK_INLINE void store_sums(float* sums) {
  constexpr int64_t stride = 4 * kSumStride;
  tile_store<0>(sums, stride);
  if (Q > 1) tile_store<1>(sums + kSide, stride);
  if (P > 1) tile_store<2>(sums + kSide * kSumStride, stride);
  if (P > 1 && Q > 1) tile_store<3>(sums + kSide * kSumStride + kSide, stride);
}

template <int P, int Q>
LK_INLINE void load_sums(const float* sums) {
  constexpr int64_t stride = 4 * kSumStride;
  tile_load<0>(sums, stride);
  if (Q > 1) tile_load<1>(sums + kSide, stride);
  if (P > 1) tile_load<2>(sums + kSide * kSumStride, stride);
  if (P > 1 && Q > 1) tile_load<3>(sums + kSide * kSumStride + kSide, stride);
}

// One step. P and Q 1: the second row and column are not read.
template <int P, int Q>
LK_INLINE void multiply_step(const bf16* row0, int64_t stride0, const bf16* row1, int64_t stride1,
                             const bf16* column0, const bf16* column1) {
  tile_load<6>(column0, kTileRowBytes);
  tile_load<4>(row0, stride0);
  tile_dot<0, 4, 6>();
  if (Q > 1) {
    tile_load<7>(column1, kTileRowBytes);
    tile_dot<1, 4, 7>();
  }
  if (P > 1) {
    tile_load<5>(row1, stride1);
    tile_dot<2, 5, 6>();
    if (Q > 1) tile_dot<3, 5, 7>();
  }
}

// The sums += P blocks of rows times Q packed blocks of columns over K numbers.
template <int P, int Q>
LK_INLINE void multiply(const Rows* rows, const bf16* const* columns, int64_t K) {
  const Rows &r0 = rows[0], &r1 = rows[P - 1];
  const bf16 *p0 = r0.first, *p1 = r1.first, *q0 = columns[0], *q1 = columns[Q - 1];
  for (int64_t k = K / kStep; k > 0; k--) {
    multiply_step<P, Q>(p0, r0.stride, p1, r1.stride, q0, q1);
    p0 += r0.next;
    p1 += r1.next;
    q0 += kTile;
    q1 += kTile;
  }
  if (K % kStep != 0) multiply_step<P, Q>(r0.rest, kTileRowBytes, r1.rest, kTileRowBytes, q0, q1);
}

// The first n of 32 numbers, rounded.
LK_INLINE void store_row_n(bf16* p, vf lo, vf hi, int n) {
  store_n(p, lo, clip(n, kLanes));
  if (n > kLanes) store_n(p + kLanes, hi, n - kLanes);
}

// body(std::integral_constant<P>, std::integral_constant<Q>) with P and Q 1 or 2.
template <class Body>
LK_INLINE void with_tiles(int p, int q, const Body& body) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  if (p == 1) {
    q == 1 ? body(One(), One()) : body(One(), Two());
  } else {
    q == 1 ? body(Two(), One()) : body(Two(), Two());
  }
}

}  // namespace LK_ISA
}  // namespace lora_kernels
