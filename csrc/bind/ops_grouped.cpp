// CPU kernels of projections that share their input: the shrinks of all of them in one parallel
// region, then each base product with its update; backward, dx of all of them in one tensor.
//
// h and g are (M, sum of ranks): the projections' columns side by side.
#include "linear_call.h"

namespace lora_kernels {
namespace {

// The projections of one call, checked; `first` is a projection's first column of h.
struct Group {
  std::vector<TensorArg> weights, a, b;
  std::vector<Shape> shapes;
  std::vector<int64_t> first;
  std::vector<float> scales;
  int64_t columns = 0;
  size_t count() const { return shapes.size(); }
};

Group read_group(TensorArg& x, std::vector<TensorArg> weights, std::vector<TensorArg> a,
                 std::vector<TensorArg> b, std::vector<TensorArg> scalings) {
  Group g;
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0 && a.size() == count && b.size() == count && scalings.size() == count,
                  "weights, lora_a, lora_b, scalings: expected one a projection");
  for (size_t i = 0; i < count; i++) {
    g.shapes.push_back(read_shape(x, a[i], b[i], std::nullopt));
    check_weight(weights[i], g.shapes[i]);
    STD_TORCH_CHECK(g.shapes[i].a_dtype == g.shapes[0].a_dtype, "lora_a: expected one dtype");
    g.scales.push_back(read_scaling(scalings[i]));
    g.first.push_back(g.columns);
    g.columns += g.shapes[i].R;
  }
  g.weights = std::move(weights);
  g.a = std::move(a);
  g.b = std::move(b);
  return g;
}

void grouped_lora_linear(StableIValue* stack, uint64_t, uint64_t) {
  TensorArg x = take_tensor(stack[0]);
  std::vector<TensorArg> weights = take_list(stack[1]), biases = take_list(stack[2]),
                         a = take_list(stack[3]), b = take_list(stack[4]),
                         scalings = take_list(stack[5]), y = take_list(stack[6]);
  const bool need_h = take<bool>(stack[7]), invariant = take<bool>(stack[8]);
  Group g = read_group(x, std::move(weights), std::move(a), std::move(b), std::move(scalings));
  STD_TORCH_CHECK(y.size() == g.count() && (biases.empty() || biases.size() == g.count()),
                  "y, biases: expected one a projection");
  biases.resize(g.count());
  const int64_t M = g.shapes[0].M;
  for (size_t i = 0; i < g.count(); i++) {
    check_bias(biases[i], g.shapes[i]);
    check_written(y[i], M, g.shapes[i].N, "y");
    STD_TORCH_CHECK(dtype_of(y[i], "y") == g.shapes[i].dtype, "y: expected the dtype of x");
  }
  TensorArg kept =
      need_h ? new_tensor({M, g.columns}, type_codes().f32) : new_tensor({0}, type_codes().f32);
  float* h = need_h ? kept.as<float>() : static_cast<float*>(thread_scratch(3, M * g.columns * 4));
  std::vector<DotTask> dots;
  for (size_t i = 0; i < g.count(); i++) {
    dots.push_back(shrink_task(g.shapes[i], x, g.a[i], h + g.first[i], invariant));
    dots.back().job.out_stride = g.columns;
  }
  run_dots(dots.data(), static_cast<int64_t>(dots.size()));
  for (size_t i = 0; i < g.count(); i++) {
    finish(g.shapes[i], y[i], x, g.weights[i], biases[i], g.b[i], g.scales[i], invariant,
           h + g.first[i], g.columns);
  }
  stack[0] = give(std::move(kept));
}

// dx = sum of dy W over the projections; dx keeps its dtype between them.
void base_gradient(const TensorArg& dx, std::vector<TensorArg>& dy, Group& g, bool invariant) {
  for (size_t i = 0; i < g.count(); i++) {
    const Shape& s = g.shapes[i];
    const Path path = path_for(s.M, g.weights[i], s.dtype, true, invariant);
    record_path(path);
    if (path == Path::panel) {
      AddTask task = {panel_backward(dx, dy[i], g.weights[i]), s.M, s.K};
      task.job.accumulate = i > 0;
      run_adds(&task, 1);
    } else {
      torch_backward(dx, dy[i], g.weights[i], path, i > 0);
    }
  }
}

// The factors A one below the other, so that one job adds the updates of all projections.
TensorArg stacked_a(const Group& g, int64_t K) {
  const DType dtype = g.shapes[0].a_dtype;
  const int64_t size = dtype_size(dtype);
  TensorArg all = new_tensor({g.columns, K}, type_code(dtype));
  for (size_t i = 0; i < g.count(); i++) {
    for (int64_t r = 0; r < g.shapes[i].R; r++) {
      std::memcpy(element(all.data(), (g.first[i] + r) * K, dtype),
                  element(g.a[i].data(), r * row_stride_a(g.a[i]), dtype),
                  static_cast<size_t>(K * size));
    }
  }
  return all;
}

void check_gradients(std::vector<TensorArg>& grads, const std::vector<TensorArg>& like,
                     const char* name) {
  STD_TORCH_CHECK(grads.empty() || grads.size() == like.size(), name,
                  ": expected one a projection, or none");
  for (size_t i = 0; i < grads.size(); i++) {
    check_rows(grads[i], like[i].size(0), like[i].size(1), name);
    STD_TORCH_CHECK(grads[i].type() == like[i].type() && grads[i].contiguous(), name,
                    ": expected contiguous tensors like the adapters");
  }
}

GradTask gradient(const TensorArg& x, DType dtype, int64_t K, const float* g, int64_t g_stride,
                  const Shape& s, float alpha, const TensorArg& out, DType out_dtype) {
  GradTask t = {};
  t.job.x = x.data();
  t.job.x_stride = x.stride(0);
  t.job.x_dtype = dtype;
  t.job.g = g;
  t.job.g_stride = g_stride;
  t.job.M = s.M;
  t.job.R = s.R;
  t.job.alpha = alpha;
  t.job.out = out.data();
  t.job.out_stride = out.stride(0);
  t.job.out_dtype = out_dtype;
  t.K = K;
  return t;
}

void grouped_lora_backward(StableIValue* stack, uint64_t, uint64_t) {
  TensorArg x = take_tensor(stack[0]);
  std::vector<TensorArg> dy = take_list(stack[1]), weights = take_list(stack[2]),
                         a = take_list(stack[3]), b = take_list(stack[4]),
                         scalings = take_list(stack[5]);
  TensorArg h = take_tensor(stack[6]);
  std::vector<TensorArg> da = take_list(stack[7]), db = take_list(stack[8]);
  const bool need_x = take<bool>(stack[9]), invariant = take<bool>(stack[10]);
  Group g = read_group(x, std::move(weights), std::move(a), std::move(b), std::move(scalings));
  const int64_t M = g.shapes[0].M, K = g.shapes[0].K;
  const DType dtype = g.shapes[0].dtype;
  STD_TORCH_CHECK(dy.size() == g.count(), "dy: expected one a projection");
  for (size_t i = 0; i < g.count(); i++) {
    check_rows(dy[i], M, g.shapes[i].N, "dy");
    STD_TORCH_CHECK(dtype_of(dy[i], "dy") == dtype, "dy: expected the dtype of x");
    make_row_major(dy[i]);
  }
  check_rows(h, M, g.columns, "h");
  STD_TORCH_CHECK(h.type() == type_codes().f32, "h: expected float32");
  make_row_major(h);
  check_gradients(da, g.a, "da");
  check_gradients(db, g.b, "db");

  float* low = static_cast<float*>(thread_scratch(3, M * g.columns * 4));
  if (need_x || !da.empty()) {
    int64_t bytes = 0;
    for (const Shape& s : g.shapes) bytes += s.N * s.R * dtype_size(s.b_dtype);
    char* bt = static_cast<char*>(thread_scratch(2, bytes));
    std::vector<DotTask> dots;
    for (size_t i = 0; i < g.count(); i++) {
      const Shape& s = g.shapes[i];
      run_transpose(bt, s.N, g.b[i].data(), g.b[i].stride(0), s.b_dtype, s.N, s.R);
      DotTask t = {};
      t.job.x = dy[i].data();
      t.job.x_stride = dy[i].stride(0);
      t.job.x_dtype = dtype;
      t.job.a = bt;
      t.job.a_stride = s.N;
      t.job.a_dtype = s.b_dtype;
      t.job.out = low + g.first[i];
      t.job.out_stride = g.columns;
      t.job.K = s.N;
      t.job.alpha = g.scales[i];
      t.M = M;
      t.R = s.R;
      t.by_rows = shrink_by_rows(M, dtype, s.b_dtype, isa(), invariant);
      dots.push_back(t);
      bt += s.N * s.R * dtype_size(s.b_dtype);
    }
    run_dots(dots.data(), static_cast<int64_t>(dots.size()));
  }
  TensorArg dx = need_x ? new_tensor({M, K}, type_code(dtype)) : new_tensor({0}, type_code(dtype));
  AddTask add = {};
  TensorArg all;
  if (need_x) {
    if (M > 0 && K > 0) base_gradient(dx, dy, g, invariant);
    all = stacked_a(g, K);
    add = {{}, M, K};
    add.job.y = dx.data();
    add.job.y_stride = K;
    add.job.y_dtype = dtype;
    add.job.update = factors(low, g.columns, all.data(), K, false, g.columns);
    add.job.b_dtype = g.shapes[0].a_dtype;
    add.job.scale = 1.0f;
    add.job.accumulate = true;
  }
  std::vector<GradTask> grads;
  for (size_t i = 0; i < g.count(); i++) {
    const Shape& s = g.shapes[i];
    if (!da.empty()) {
      grads.push_back(
          gradient(x, dtype, K, low + g.first[i], g.columns, s, 1.0f, da[i], s.a_dtype));
    }
    if (!db.empty()) {
      grads.push_back(gradient(dy[i], dtype, s.N, h.as<float>() + g.first[i], h.stride(0), s,
                               g.scales[i], db[i], s.b_dtype));
      grads.back().job.transposed = true;
    }
  }
  run_adds_and_grads(&add, need_x ? 1 : 0, grads.data(), static_cast<int64_t>(grads.size()));
  stack[0] = give(std::move(dx));
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("grouped_lora_linear", &lora_kernels::grouped_lora_linear);
  m.impl("grouped_lora_backward", &lora_kernels::grouped_lora_backward);
}
