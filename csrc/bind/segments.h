// A batch whose rows name their own adapters, as the kernels take it: one segment a slot that has
// rows, with its live ranks and where its matrices lie. Plan values come from the caller and are
// checked here one by one: nothing outside the tensors is ever addressed.
#pragma once

#include "base_product.h"

namespace lora_kernels {

using Splits = std::optional<std::vector<int64_t>>;

// Starts of the slices' columns, then N.
inline std::vector<int64_t> slice_starts(const Splits& splits, int64_t N) {
  std::vector<int64_t> starts = {0};
  if (!splits.has_value()) {
    starts.push_back(N);
    return starts;
  }
  for (int64_t width : *splits) {
    STD_TORCH_CHECK(width >= 0 && width <= N - starts.back(),
                    "out_splits: expected widths that add up to out_features");
    starts.push_back(starts.back() + width);
  }
  STD_TORCH_CHECK(starts.size() > 1 && starts.back() == N,
                  "out_splits: expected widths that add up to out_features");
  return starts;
}

struct Segment {
  int64_t slot = 0;
  const int32_t* rows = nullptr;
  int64_t count = 0;
  float scale = 0.0f;
  const void* a = nullptr;  // slice s, rank r at a + s * a_slice + r * a_stride
  int64_t a_slice = 0, a_stride = 0;
  DType a_dtype = DType::f32;
  const void* b = nullptr;
  int64_t b_stride = 0;
  DType b_dtype = DType::f32;
  std::vector<int64_t> ranks;  // live rank of each slice
};

struct Batch {
  std::vector<int32_t> rows;
  std::vector<Segment> segments;
  int64_t num_slots = 0;
};

inline const int32_t* int_values(TensorArg& t, const char* name) {
  t.read();
  STD_TORCH_CHECK(t.type() == type_codes().i32, name, ": expected int32");
  make_contiguous(t);
  return t.as<int32_t>();
}

inline Batch read_batch(int64_t M, TensorArg& row_order, TensorArg& segment_starts) {
  Batch batch;
  const int32_t* order = int_values(row_order, "row_order");
  const int32_t* starts = int_values(segment_starts, "segment_starts");
  STD_TORCH_CHECK(row_order.dim() == 1, "row_order: expected 1 dimension");
  STD_TORCH_CHECK(segment_starts.dim() == 1 && segment_starts.size(0) >= 2,
                  "segment_starts: expected num_slots + 2 values");
  batch.num_slots = segment_starts.size(0) - 2;
  const int64_t length = row_order.size(0);
  batch.rows.reserve(static_cast<size_t>(M));
  for (int64_t slot = 0; slot < batch.num_slots; slot++) {
    const int64_t begin = starts[slot + 1], end = starts[slot + 2];
    STD_TORCH_CHECK(begin >= 0 && begin <= end && end <= length,
                    "segment_starts: expected ascending positions in row_order");
    Segment segment;
    segment.slot = slot;
    for (int64_t i = begin; i < end; i++) {
      if (order[i] < 0 || order[i] >= M) continue;  // padding of a plan with room to spare
      batch.rows.push_back(order[i]);
      segment.count++;
    }
    if (segment.count > 0) batch.segments.push_back(std::move(segment));
  }
  const int32_t* rows = batch.rows.data();
  for (Segment& segment : batch.segments) {
    segment.rows = rows;
    rows += segment.count;
  }
  return batch;
}

inline void read_scalings(Batch& batch, TensorArg& scalings) {
  scalings.read();
  STD_TORCH_CHECK(scalings.dim() == 1 && scalings.size(0) >= batch.num_slots &&
                      scalings.type() == type_codes().f32,
                  "slot_scalings: expected float32, one a slot");
  make_contiguous(scalings);
  for (Segment& segment : batch.segments) segment.scale = scalings.as<float>()[segment.slot];
}

inline void read_ranks(Batch& batch, TensorArg& slot_ranks, int64_t S, int64_t R) {
  const int32_t* values = nullptr;
  int64_t width = 0;
  if (slot_ranks.defined()) {
    values = int_values(slot_ranks, "slot_ranks");
    width = slot_ranks.dim() == 2 ? slot_ranks.size(1) : 1;
    STD_TORCH_CHECK(slot_ranks.dim() >= 1 && slot_ranks.dim() <= 2 &&
                        slot_ranks.size(0) >= batch.num_slots && (width == 1 || width == S),
                    "slot_ranks: expected (num_slots) or (num_slots, slices)");
  }
  for (Segment& segment : batch.segments) {
    for (int64_t s = 0; s < S; s++) {
      int64_t rank = R;
      if (values != nullptr) rank = values[segment.slot * width + (width == 1 ? 0 : s)];
      segment.ranks.push_back(rank < 0 ? 0 : rank > R ? R : rank);
    }
  }
}

inline void check_adapter_dtype(DType t, DType x, const char* name) {
  STD_TORCH_CHECK(t == x || t == DType::f32, name, ": expected the dtype of x, or float32");
}

// a_bank (num_slots, R, K) or (num_slots, S, R, K): sets the segments' A. Returns R.
inline int64_t read_a_bank(Batch& batch, TensorArg& bank, int64_t S, int64_t K, DType dtype) {
  bank.read();
  const int64_t d = bank.dim();
  STD_TORCH_CHECK(
      d == 3 ? S == 1 : d == 4 && bank.size(1) == S,
      "a_bank: expected (num_slots, max_rank, in_features), with slices after num_slots");
  STD_TORCH_CHECK(bank.size(0) >= batch.num_slots && bank.size(d - 1) == K &&
                      (bank.size(d - 2) >= 1 || bank.size(0) == 0),
                  "a_bank: expected num_slots slots of in_features columns and rank >= 1");
  const DType type = dtype_of(bank, "a_bank");
  check_adapter_dtype(type, dtype, "a_bank");
  make_contiguous(bank);
  const int64_t R = bank.size(d - 2);
  for (Segment& segment : batch.segments) {
    segment.a = element(bank.data(), segment.slot * S * R * K, type);
    segment.a_slice = R * K;
    segment.a_stride = K;
    segment.a_dtype = type;
  }
  return R;
}

// b_bank (num_slots, N, R): sets the segments' B.
inline void read_b_bank(Batch& batch, TensorArg& bank, int64_t N, int64_t R, DType dtype) {
  bank.read();
  STD_TORCH_CHECK(
      bank.dim() == 3 && bank.size(0) >= batch.num_slots && bank.size(1) == N && bank.size(2) == R,
      "b_bank: expected (num_slots, out_features, max_rank)");
  const DType type = dtype_of(bank, "b_bank");
  check_adapter_dtype(type, dtype, "b_bank");
  make_contiguous(bank);
  for (Segment& segment : batch.segments) {
    segment.b = element(bank.data(), segment.slot * N * R, type);
    segment.b_stride = R;
    segment.b_dtype = type;
  }
}

// One (R_i, K) or (S, R_i, K) and one (N, R_i) a slot, each checked, also where it has no rows.
// Returns the largest rank of those that have.
inline int64_t read_adapters(Batch& batch, std::vector<TensorArg>& a, std::vector<TensorArg>& b,
                             int64_t S, int64_t N, int64_t K, DType dtype) {
  const size_t slots = static_cast<size_t>(batch.num_slots);
  STD_TORCH_CHECK(a.size() == slots && b.size() == slots,
                  "lora_a, lora_b: expected one a slot of the plan");
  bool mixed = false;  // of all slots: a row's bits must not depend on which others have rows
  for (size_t slot = 0; slot < slots; slot++) {
    TensorArg &ai = a[slot], &bi = b[slot];
    ai.read();
    bi.read();
    const int64_t d = ai.dim();
    STD_TORCH_CHECK(d == 2 ? S == 1 : d == 3 && ai.size(0) == S,
                    "lora_a: expected (rank, "
                    "in_features), with slices first");
    const int64_t R = ai.size(d - 2);
    STD_TORCH_CHECK(R >= 1 && ai.size(d - 1) == K,
                    "lora_a: expected in_features columns and rank >= 1");
    STD_TORCH_CHECK(bi.dim() == 2 && bi.size(0) == N && bi.size(1) == R,
                    "lora_b: expected (out_features, rank)");
    check_adapter_dtype(dtype_of(ai, "lora_a"), dtype, "lora_a");
    check_adapter_dtype(dtype_of(bi, "lora_b"), dtype, "lora_b");
    mixed |= dtype_of(bi, "lora_b") != dtype_of(b[0], "lora_b");
  }
  int64_t most = 0;
  for (Segment& segment : batch.segments) {
    TensorArg &ai = a[static_cast<size_t>(segment.slot)],
              &bi = b[static_cast<size_t>(segment.slot)];
    const int64_t R = bi.size(1);
    segment.a_dtype = dtype_of(ai, "lora_a");
    segment.b_dtype = dtype_of(bi, "lora_b");
    make_contiguous(ai);
    make_contiguous(bi);
    segment.a = ai.data();
    segment.a_slice = R * K;
    segment.a_stride = K;
    segment.b = bi.data();
    segment.b_stride = R;
    segment.ranks.assign(static_cast<size_t>(S), R);
    most = R > most ? R : most;
  }
  // The streaming kernel reads one dtype of B; widening is exact.
  for (Segment& segment : batch.segments) {
    if (!mixed || segment.b_dtype == DType::f32) continue;
    TensorArg& bi = b[static_cast<size_t>(segment.slot)];
    TensorArg wide = new_tensor({bi.size(0), bi.size(1)}, type_codes().f32);
    LK_ABI(aoti_torch_copy_(wide.get(), bi.get(), 0));
    bi = std::move(wide);
    segment.b = bi.data();
    segment.b_dtype = DType::f32;
  }
  return most;
}

}  // namespace lora_kernels
