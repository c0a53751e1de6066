// CPU kernels of multi_lora_linear and its parts: the base product over all rows, and for each slot
// the update of its own rows.
//
// Forward is two parallel regions: h of every segment, then the base product. Our streaming kernel
// takes each row's own B along in that pass; after the vendor's GEMM the segments are added in one
// more region. Only live ranks are computed, and a row only ever meets its own adapter's numbers.
#include "segments.h"

namespace lora_kernels {
namespace {

// x (M, K), weight (N, K) and bias of a batch, checked.
struct Base {
  int64_t M = 0, N = 0, K = 0;
  DType dtype = DType::f32;
};

Base read_base(TensorArg& x, TensorArg& w, TensorArg& bias) {
  x.read();
  w.read();
  STD_TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions");
  STD_TORCH_CHECK(w.dim() == 2 && w.size(1) == x.size(1),
                  "weight: expected (out_features, in_features)");
  const Base base = {x.size(0), w.size(0), x.size(1), dtype_of(x, "x")};
  STD_TORCH_CHECK(dtype_of(w, "weight") == base.dtype, "weight: expected the dtype of x");
  if (bias.defined()) {
    bias.read();
    STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == base.N, "bias: expected (out_features)");
    STD_TORCH_CHECK(dtype_of(bias, "bias") == base.dtype, "bias: expected the dtype of x");
    make_contiguous(bias);
  }
  make_row_major(x);
  return base;
}

// h[row, s * R + r] of the live ranks of every segment.
void shrink_tasks(std::vector<DotTask>& tasks, const Batch& batch, const TensorArg& x, DType dtype,
                  float* h, int64_t S, int64_t R, bool invariant) {
  for (const Segment& segment : batch.segments) {
    for (int64_t s = 0; s < S; s++) {
      DotTask t = {};
      t.job.x = x.data();
      t.job.x_stride = x.stride(0);
      t.job.x_dtype = dtype;
      t.job.a = element(segment.a, s * segment.a_slice, segment.a_dtype);
      t.job.a_stride = segment.a_stride;
      t.job.a_dtype = segment.a_dtype;
      t.job.out = h + s * R;
      t.job.out_stride = S * R;
      t.job.K = x.size(1);
      t.job.alpha = 1.0f;
      t.job.rows = segment.rows;
      t.M = segment.count;
      t.R = segment.ranks[static_cast<size_t>(s)];
      t.by_rows = shrink_by_rows(t.M, dtype, segment.a_dtype, isa(), invariant);
      if (t.R > 0) tasks.push_back(t);
    }
  }
}

void expand(const Batch& batch, const TensorArg& y, DType y_dtype, const float* h,
            const std::vector<int64_t>& starts, int64_t R) {
  const int64_t S = static_cast<int64_t>(starts.size()) - 1;
  std::vector<AddTask> tasks;
  for (const Segment& segment : batch.segments) {
    for (int64_t s = 0; s < S; s++) {
      AddTask t = {};
      const int64_t first = starts[static_cast<size_t>(s)];
      t.job.y = element(y.data(), first, y_dtype);
      t.job.y_stride = y.stride(0);
      t.job.y_dtype = y_dtype;
      t.job.update =
          factors(h + s * R, S * R, element(segment.b, first * segment.b_stride, segment.b_dtype),
                  segment.b_stride, true, segment.ranks[static_cast<size_t>(s)]);
      t.job.b_dtype = segment.b_dtype;
      t.job.scale = segment.scale;
      t.job.accumulate = true;
      t.job.rows = segment.rows;
      t.M = segment.count;
      t.N = starts[static_cast<size_t>(s) + 1] - first;
      tasks.push_back(t);
    }
  }
  run_adds(tasks.data(), static_cast<int64_t>(tasks.size()));
}

TensorArg forward(const Base& base, const Batch& batch, const TensorArg& x, TensorArg& w,
                  const TensorArg& bias, const std::vector<int64_t>& starts, int64_t R,
                  bool invariant) {
  const int64_t S = static_cast<int64_t>(starts.size()) - 1;
  TensorArg y = new_tensor({base.M, base.N}, type_code(base.dtype));
  if (base.M == 0 || base.N == 0) return y;
  float* h = static_cast<float*>(thread_scratch(3, base.M * S * R * 4));
  std::vector<DotTask> dots;
  shrink_tasks(dots, batch, x, base.dtype, h, S, R, invariant);
  run_dots(dots.data(), static_cast<int64_t>(dots.size()));

  const Path path = path_for(base.M, w, base.dtype, false, invariant);
  RowUpdate* updates = nullptr;
  if (joins_rows(path, base.M, S, invariant) && !batch.segments.empty()) {
    const size_t bytes = static_cast<size_t>(S * base.M) * sizeof(RowUpdate);
    updates = static_cast<RowUpdate*>(thread_scratch(2, static_cast<int64_t>(bytes)));
    std::memset(static_cast<void*>(updates), 0, bytes);
    for (const Segment& segment : batch.segments) {
      for (int64_t s = 0; s < S; s++) {
        for (int64_t i = 0; i < segment.count; i++) {
          const int64_t m = segment.rows[i];
          updates[s * base.M + m] = {h + m * S * R + s * R, segment.b, segment.b_stride,
                                     segment.ranks[static_cast<size_t>(s)], segment.scale};
        }
      }
    }
  }
  const DType b_dtype = batch.segments.empty() ? base.dtype : batch.segments[0].b_dtype;
  if (!base_forward(y, x, w, bias, updates, b_dtype, starts.data(), S, path)) {
    expand(batch, y, base.dtype, h, starts, R);
  }
  return y;
}

void multi_lora_linear(StableIValue* stack, uint64_t, uint64_t) {
  TensorArg x = take_tensor(stack[0]), w = take_tensor(stack[1]), bias = take_optional(stack[2]),
            a_bank = take_tensor(stack[3]), b_bank = take_tensor(stack[4]),
            scalings = take_tensor(stack[5]), ranks = take_optional(stack[6]),
            order = take_tensor(stack[7]), segment_starts = take_tensor(stack[8]);
  const Splits splits = take<Splits>(stack[9]);
  const Base base = read_base(x, w, bias);
  const std::vector<int64_t> starts = slice_starts(splits, base.N);
  const int64_t S = static_cast<int64_t>(starts.size()) - 1;
  Batch batch = read_batch(base.M, order, segment_starts);
  const int64_t R = read_a_bank(batch, a_bank, S, base.K, base.dtype);
  read_b_bank(batch, b_bank, base.N, R, base.dtype);
  read_ranks(batch, ranks, S, R);
  read_scalings(batch, scalings);
  stack[0] = give(forward(base, batch, x, w, bias, starts, R, take<bool>(stack[10])));
}

void multi_lora_linear_list(StableIValue* stack, uint64_t, uint64_t) {
  TensorArg x = take_tensor(stack[0]), w = take_tensor(stack[1]), bias = take_optional(stack[2]);
  std::vector<TensorArg> a = take_list(stack[3]), b = take_list(stack[4]);
  TensorArg scalings = take_tensor(stack[5]), order = take_tensor(stack[6]),
            segment_starts = take_tensor(stack[7]);
  const Splits splits = take<Splits>(stack[8]);
  const Base base = read_base(x, w, bias);
  const std::vector<int64_t> starts = slice_starts(splits, base.N);
  Batch batch = read_batch(base.M, order, segment_starts);
  const int64_t R = read_adapters(batch, a, b, static_cast<int64_t>(starts.size()) - 1, base.N,
                                  base.K, base.dtype);
  read_scalings(batch, scalings);
  stack[0] = give(forward(base, batch, x, w, bias, starts, R, take<bool>(stack[9])));
}

void lora_shrink(StableIValue* stack, uint64_t, uint64_t) {
  TensorArg x = take_tensor(stack[0]), a_bank = take_tensor(stack[1]),
            ranks = take_optional(stack[2]), order = take_tensor(stack[3]),
            segment_starts = take_tensor(stack[4]);
  x.read();
  STD_TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions");
  make_row_major(x);
  const DType dtype = dtype_of(x, "x");
  Batch batch = read_batch(x.size(0), order, segment_starts);
  a_bank.read();
  const bool sliced = a_bank.dim() == 4;
  const int64_t S = sliced ? a_bank.size(1) : 1;
  const int64_t R = read_a_bank(batch, a_bank, S, x.size(1), dtype);
  read_ranks(batch, ranks, S, R);
  TensorArg h = sliced ? new_tensor({x.size(0), S, R}, type_codes().f32)
                       : new_tensor({x.size(0), R}, type_codes().f32);
  if (h.numel() > 0) std::memset(h.data(), 0, static_cast<size_t>(h.numel()) * 4);
  record_path(Path::add);
  std::vector<DotTask> dots;
  shrink_tasks(dots, batch, x, dtype, h.as<float>(), S, R,
               true);  // its caller can not ask for invariance
  run_dots(dots.data(), static_cast<int64_t>(dots.size()));
  stack[0] = give(std::move(h));
}

void lora_expand(StableIValue* stack, uint64_t, uint64_t) {
  TensorArg y = take_tensor(stack[0]), h = take_tensor(stack[1]), b_bank = take_tensor(stack[2]),
            scalings = take_tensor(stack[3]), ranks = take_optional(stack[4]),
            order = take_tensor(stack[5]), segment_starts = take_tensor(stack[6]);
  const Splits splits = take<Splits>(stack[7]);
  y.read();
  h.read();
  STD_TORCH_CHECK(y.dim() == 2, "y: expected 2 dimensions");
  const int64_t M = y.size(0), N = y.size(1);
  STD_TORCH_CHECK((N <= 1 || y.stride(1) == 1) && (M <= 1 || y.stride(0) >= N),
                  "y: expected rows that are contiguous and do not overlap");
  const std::vector<int64_t> starts = slice_starts(splits, N);
  const int64_t S = static_cast<int64_t>(starts.size()) - 1, d = h.dim();
  STD_TORCH_CHECK(d >= 2 && d <= 3 && h.size(0) == M && (d == 3 ? h.size(1) == S : S == 1) &&
                      h.type() == type_codes().f32,
                  "h: expected float32 (num_tokens, rank), with slices before rank");
  make_contiguous(h);
  const int64_t R = h.size(d - 1);
  Batch batch = read_batch(M, order, segment_starts);
  const DType dtype = dtype_of(y, "y");
  b_bank.read();
  // y may be float32 over any adapter; otherwise the adapter has y's dtype or float32.
  read_b_bank(batch, b_bank, N, R, dtype == DType::f32 ? dtype_of(b_bank, "b_bank") : dtype);
  read_ranks(batch, ranks, S, R);
  read_scalings(batch, scalings);
  record_path(Path::add);
  expand(batch, y, dtype, h.as<float>(), starts, R);
}

// The gradient of one slot's matrices; zero where it has no rows.
void check_gradients(std::vector<TensorArg>& grads, std::vector<TensorArg>& like,
                     const char* name) {
  for (size_t i = 0; i < grads.size(); i++) {
    TensorArg &g = grads[i], &t = like[i];
    g.read();
    t.read();
    bool same = g.dim() == t.dim() && g.type() == t.type() && g.contiguous();
    for (int64_t d = 0; same && d < g.dim(); d++) same = g.size(d) == t.size(d);
    STD_TORCH_CHECK(same, name, ": expected contiguous tensors like the adapters");
    if (g.numel() > 0) {
      std::memset(g.data(), 0, static_cast<size_t>(g.numel() * dtype_size(dtype_of(g, name))));
    }
  }
}

void multi_lora_backward(StableIValue* stack, uint64_t, uint64_t) {
  TensorArg dy = take_tensor(stack[0]), x = take_tensor(stack[1]), w = take_optional(stack[2]);
  std::vector<TensorArg> a = take_list(stack[3]), b = take_list(stack[4]);
  TensorArg scalings = take_tensor(stack[5]), order = take_tensor(stack[6]),
            segment_starts = take_tensor(stack[7]);
  const Splits splits = take<Splits>(stack[8]);
  std::vector<TensorArg> da = take_list(stack[9]), db = take_list(stack[10]);
  const bool need_x = take<bool>(stack[11]);
  x.read();
  dy.read();
  STD_TORCH_CHECK(x.dim() == 2 && dy.dim() == 2 && dy.size(0) == x.size(0),
                  "dy, x: expected 2 dimensions and the same rows");
  const int64_t M = x.size(0), K = x.size(1), N = dy.size(1);
  const DType dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(dtype_of(dy, "dy") == dtype, "dy: expected the dtype of x");
  make_row_major(x);
  make_row_major(dy);
  if (w.defined()) {
    w.read();
    STD_TORCH_CHECK(
        w.dim() == 2 && w.size(0) == N && w.size(1) == K && dtype_of(w, "weight") == dtype,
        "weight: expected (out_features, in_features) in the dtype of x");
  }
  const std::vector<int64_t> starts = slice_starts(splits, N);
  const int64_t S = static_cast<int64_t>(starts.size()) - 1;
  Batch batch = read_batch(M, order, segment_starts);
  STD_TORCH_CHECK((da.empty() || da.size() == a.size()) && (db.empty() || db.size() == b.size()),
                  "da, db: expected one an adapter, or none");
  check_gradients(da, a, "da");
  check_gradients(db, b, "db");
  std::vector<DType> b_dtypes;
  for (TensorArg& t : b) {
    t.read();
    b_dtypes.push_back(dtype_of(t, "lora_b"));
  }
  const int64_t R = read_adapters(batch, a, b, S, N, K, dtype);
  read_scalings(batch, scalings);

  // B transposed, h and g = s dy B, side by side.
  int64_t elements = 0;
  for (const Segment& segment : batch.segments) elements += N * segment.ranks[0];
  char* bt = static_cast<char*>(thread_scratch(2, elements * 4));
  float* h = static_cast<float*>(thread_scratch(3, 2 * M * S * R * 4));
  float* g = h + M * S * R;
  std::vector<DotTask> dots;
  if (!db.empty()) shrink_tasks(dots, batch, x, dtype, h, S, R, false);
  std::vector<GradTask> grads;
  std::vector<AddTask> adds;
  TensorArg dx = need_x ? new_tensor({M, K}, type_code(dtype)) : new_tensor({0}, type_code(dtype));
  for (const Segment& segment : batch.segments) {
    const int64_t rank = segment.ranks[0];
    const size_t slot = static_cast<size_t>(segment.slot);
    if (need_x || !da.empty()) {
      run_transpose(bt, N, segment.b, segment.b_stride, segment.b_dtype, N, rank);
    }
    for (int64_t s = 0; s < S; s++) {
      const int64_t first = starts[static_cast<size_t>(s)];
      const int64_t width = starts[static_cast<size_t>(s) + 1] - first;
      if (need_x || !da.empty()) {
        DotTask t = {};
        t.job.x = element(dy.data(), first, dtype);
        t.job.x_stride = dy.stride(0);
        t.job.x_dtype = dtype;
        t.job.a = element(bt, first, segment.b_dtype);
        t.job.a_stride = N;
        t.job.a_dtype = segment.b_dtype;
        t.job.out = g + s * R;
        t.job.out_stride = S * R;
        t.job.K = width;
        t.job.alpha = segment.scale;
        t.job.rows = segment.rows;
        t.M = segment.count;
        t.R = rank;
        t.by_rows = shrink_by_rows(t.M, dtype, segment.b_dtype, isa(), false);
        dots.push_back(t);
      }
      if (need_x) {
        AddTask t = {};
        t.job.y = dx.data();
        t.job.y_stride = K;
        t.job.y_dtype = dtype;
        t.job.update =
            factors(g + s * R, S * R, element(segment.a, s * segment.a_slice, segment.a_dtype),
                    segment.a_stride, false, rank);
        t.job.b_dtype = segment.a_dtype;
        t.job.scale = 1.0f;
        t.job.accumulate = true;
        t.job.rows = segment.rows;
        t.M = segment.count;
        t.N = K;
        adds.push_back(t);
      }
      GradTask t = {};
      t.job.M = segment.count;
      t.job.R = rank;
      t.job.g_stride = S * R;
      t.job.x_dtype = dtype;
      t.job.rows = segment.rows;
      if (!da.empty()) {
        t.job.x = x.data();
        t.job.x_stride = x.stride(0);
        t.job.g = g + s * R;
        t.job.alpha = 1.0f;
        t.job.out_dtype = segment.a_dtype;
        t.job.out = element(da[slot].data(), s * rank * K, segment.a_dtype);
        t.job.out_stride = K;
        t.K = K;
        grads.push_back(t);
      }
      if (!db.empty()) {
        t.job.x = element(dy.data(), first, dtype);
        t.job.x_stride = dy.stride(0);
        t.job.g = h + s * R;
        t.job.alpha = segment.scale;
        t.job.out_dtype = b_dtypes[slot];
        t.job.out = element(db[slot].data(), first * rank, b_dtypes[slot]);
        t.job.out_stride = rank;
        t.job.transposed = true;
        t.K = width;
        grads.push_back(t);
      }
    }
    bt += N * rank * dtype_size(segment.b_dtype);
  }
  run_dots(dots.data(), static_cast<int64_t>(dots.size()));
  if (need_x && M > 0 && K > 0) {
    if (w.defined()) {
      const Path path = path_for(M, w, dtype, true, false);
      record_path(path);
      if (path == Path::panel) {
        const AddTask task = {panel_backward(dx, dy, w), M, K};
        run_adds(&task, 1);
      } else {
        torch_backward(dx, dy, w, path);
      }
    } else {
      std::memset(dx.data(), 0, static_cast<size_t>(M * K * dtype_size(dtype)));
    }
  }
  run_adds_and_grads(adds.data(), static_cast<int64_t>(adds.size()), grads.data(),
                     static_cast<int64_t>(grads.size()));
  stack[0] = give(std::move(dx));
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("multi_lora_linear", &lora_kernels::multi_lora_linear);
  m.impl("multi_lora_linear_list", &lora_kernels::multi_lora_linear_list);
  m.impl("multi_lora_backward", &lora_kernels::multi_lora_backward);
  m.impl("lora_shrink", &lora_kernels::lora_shrink);
  m.impl("lora_expand_", &lora_kernels::lora_expand);
}
