// CPU kernels of lora_linear, lora_add_ and their gradients: checks, scratch, and the order of
// work.
//
// Forward: h = x A^T (with dropout bits drawn in the same pass), then the base product; our own
// kernels add s h B^T before the one rounding, after the vendor's GEMM it is added in place.
// Backward: g = s dy B and dB = s dy^T h together in one parallel region, then dx = dy W + g A on
// the chosen path and dA = g^T x.
#include <cmath>

#include "linear_call.h"

namespace lora_kernels {
namespace {

struct Dropout {
  float p = 0.0f;
  TensorArg mask;
  uint64_t seed = 0;
};

uint32_t threshold_of(double p) { return static_cast<uint32_t>(std::lrint(p * 65536.0)); }

// h (M, S * R) = dropout(x) A^T, as a task and, where the bits are not drawn yet, how to draw them.
struct Shrink {
  DotTask task;
  std::optional<Draw> draw;
};

Shrink make_shrink(const Shape& s, const TensorArg& x, const TensorArg& a, float* h,
                   const Dropout* dropout, bool invariant) {
  Shrink shrink = {shrink_task(s, x, a, h, invariant), std::nullopt};
  if (dropout != nullptr && dropout->p > 0.0f) {
    shrink.task.job.mask = dropout->mask.as<uint8_t>();
    shrink.task.job.mask_stride = (s.K + 7) / 8;
    shrink.task.job.alpha = 1.0f / (1.0f - dropout->p);
    shrink.draw = {dropout->mask.as<uint8_t>(), dropout->seed, threshold_of(dropout->p)};
  }
  return shrink;
}

void run(const Shrink& shrink) {
  if (shrink.draw) {
    run_dots_with_dropout(shrink.task, *shrink.draw);
  } else {
    run_dots(&shrink.task, 1);
  }
}

// The shrink, and y += scale * h B^T after it.
void update(const Shape& s, const Shrink& shrink, const TensorArg& y, DType y_dtype,
            const TensorArg& b, float scale) {
  const float* h = shrink.task.job.out;
  const auto tasks = expand_tasks(s, y, y_dtype, h, s.S * s.R, b, scale);
  run_update(shrink.task, shrink.draw ? &*shrink.draw : nullptr, tasks.data(),
             static_cast<int64_t>(tasks.size()));
}

// y, given and checked; h is written when it is not null.
void forward(const Shape& s, const TensorArg& y, const TensorArg& x, TensorArg& w,
             const TensorArg& bias, const TensorArg& a, const TensorArg& b, float scale,
             bool invariant, float* h, const Dropout* dropout) {
  if (s.M == 0) return;
  if (h == nullptr) h = static_cast<float*>(thread_scratch(3, s.M * s.S * s.R * 4));
  const Shrink shrink = make_shrink(s, x, a, h, dropout, invariant);
  const Path path = path_for(s.M, w, s.dtype, false, invariant);
  const bool last = path == Path::vendor || path == Path::widened;  // the update follows the base
  if (last && s.N > 0 && (s.dtype != DType::f32 || !all_zero(b, s.b_dtype))) {
    base_forward(y, x, w, bias, nullptr, s.b_dtype, s.starts.data(), s.S, path);
    update(s, shrink, y, s.dtype, b, scale);
    return;
  }
  if (turns_whole(s, path, invariant) && s.N > 0 && s.dtype != DType::f32) {
    record_path(path);
    run_turn(turned_update(s, y, x, w, bias, b, scale, h, s.R), &shrink.task,
             shrink.draw ? &*shrink.draw : nullptr);
    return;
  }
  run(shrink);
  finish(s, y, x, w, bias, b, scale, invariant, h, s.S * s.R);
}

Dropout make_dropout(const Shape& s, double p, TensorArg& seed) {
  Dropout d;
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout_p: expected 0 <= p < 1");
  if (p == 0.0) {
    d.mask = new_tensor({0}, type_codes().u8);
    return d;
  }
  STD_TORCH_CHECK(seed.defined(), "dropout_seed: expected a 0-d int64 tensor");
  seed.read();
  STD_TORCH_CHECK(seed.numel() == 1 && seed.type() == type_codes().i64,
                  "dropout_seed: expected a 0-d int64 tensor");
  d.p = static_cast<float>(p);
  d.seed = static_cast<uint64_t>(*seed.as<int64_t>());
  d.mask = new_tensor({s.M, (s.K + 7) / 8}, type_codes().u8);
  return d;
}

void lora_linear(StableIValue* stack, uint64_t, uint64_t) {
  TensorArg x = take_tensor(stack[0]), w = take_tensor(stack[1]), bias = take_optional(stack[2]),
            a = take_tensor(stack[3]), b = take_tensor(stack[4]), scaling = take_tensor(stack[5]);
  const Splits splits = take<Splits>(stack[6]);
  const Shape s = read_shape(x, a, b, splits);
  check_weight(w, s);
  check_bias(bias, s);
  TensorArg y = new_tensor({s.M, s.N}, type_code(s.dtype));
  forward(s, y, x, w, bias, a, b, read_scaling(scaling), take<bool>(stack[7]), nullptr, nullptr);
  stack[0] = give(std::move(y));
}

void lora_linear_out(StableIValue* stack, uint64_t, uint64_t) {
  TensorArg y = take_tensor(stack[0]), x = take_tensor(stack[1]), w = take_tensor(stack[2]),
            bias = take_optional(stack[3]), a = take_tensor(stack[4]), b = take_tensor(stack[5]),
            scaling = take_tensor(stack[6]);
  const Splits splits = take<Splits>(stack[7]);
  const Shape s = read_shape(x, a, b, splits);
  check_weight(w, s);
  check_bias(bias, s);
  check_written(y, s.M, s.N, "out");
  STD_TORCH_CHECK(dtype_of(y, "out") == s.dtype, "out: expected the dtype of x");
  forward(s, y, x, w, bias, a, b, read_scaling(scaling), take<bool>(stack[8]), nullptr, nullptr);
}

void lora_linear_train(StableIValue* stack, uint64_t, uint64_t) {
  TensorArg x = take_tensor(stack[0]), w = take_tensor(stack[1]), bias = take_optional(stack[2]),
            a = take_tensor(stack[3]), b = take_tensor(stack[4]), scaling = take_tensor(stack[5]),
            seed = take_optional(stack[7]);
  const Splits splits = take<Splits>(stack[8]);
  const Shape s = read_shape(x, a, b, splits);
  check_weight(w, s);
  check_bias(bias, s);
  Dropout dropout = make_dropout(s, take<double>(stack[6]), seed);
  TensorArg y = new_tensor({s.M, s.N}, type_code(s.dtype));
  TensorArg h = new_tensor({s.M, s.S * s.R}, type_codes().f32);
  forward(s, y, x, w, bias, a, b, read_scaling(scaling), take<bool>(stack[9]), h.as<float>(),
          &dropout);
  stack[0] = give(std::move(y));
  stack[1] = give(std::move(h));
  stack[2] = give(std::move(dropout.mask));
}

void check_added(TensorArg& y, const Shape& s) {
  check_written(y, s.M, s.N, "y");
  check_adapter_dtype(dtype_of(y, "y"), s.dtype, "y");
}

void lora_add(StableIValue* stack, uint64_t, uint64_t) {
  TensorArg y = take_tensor(stack[0]), x = take_tensor(stack[1]), a = take_tensor(stack[2]),
            b = take_tensor(stack[3]), scaling = take_tensor(stack[4]);
  const Shape s = read_shape(x, a, b, std::nullopt);
  check_added(y, s);
  const float scale = read_scaling(scaling);
  record_path(Path::add);
  float* h = static_cast<float*>(thread_scratch(3, s.M * s.R * 4));
  update(s, make_shrink(s, x, a, h, nullptr, false), y, dtype_of(y, "y"), b, scale);
}

void lora_add_train(StableIValue* stack, uint64_t, uint64_t) {
  TensorArg y = take_tensor(stack[0]), x = take_tensor(stack[1]), a = take_tensor(stack[2]),
            b = take_tensor(stack[3]), scaling = take_tensor(stack[4]),
            seed = take_optional(stack[6]);
  const Shape s = read_shape(x, a, b, std::nullopt);
  check_added(y, s);
  const float scale = read_scaling(scaling);
  Dropout dropout = make_dropout(s, take<double>(stack[5]), seed);
  TensorArg h = new_tensor({s.M, s.R}, type_codes().f32);
  record_path(Path::add);
  update(s, make_shrink(s, x, a, h.as<float>(), &dropout, false), y, dtype_of(y, "y"), b, scale);
  stack[0] = give(std::move(h));
  stack[1] = give(std::move(dropout.mask));
}

// g (M, S * R) = scale * dy B, a task a slice; on vectors through B transposed, so that both
// operands are contiguous.
std::vector<DotTask> rank_gradient(const Shape& s, const TensorArg& dy, const TensorArg& b,
                                   float scale, bool invariant, float* g) {
  std::vector<DotTask> tasks;
  void* bt = nullptr;
  for (int64_t i = 0; i < s.S; i++) {
    DotTask t = {};
    t.job.x = element(dy.data(), s.starts[i], s.dtype);
    t.job.x_stride = dy.stride(0);
    t.job.x_dtype = s.dtype;
    t.job.a_dtype = s.b_dtype;
    t.job.out = g + i * s.R;
    t.job.out_stride = s.S * s.R;
    t.job.K = s.starts[i + 1] - s.starts[i];
    t.job.alpha = scale;
    t.M = s.M;
    t.R = s.R;
    t.by_rows = shrink_by_rows(s.M, s.dtype, s.b_dtype, isa(), invariant);
    t.job.a_by_rows = takes_a_by_rows(t);
    if (t.job.a_by_rows) {
      t.job.a = element(b.data(), s.starts[i] * b.stride(0), s.b_dtype);
      t.job.a_stride = b.stride(0);
    } else {
      if (bt == nullptr) {
        bt = thread_scratch(2, s.N * s.R * dtype_size(s.b_dtype));
        run_transpose(bt, s.N, b.data(), b.stride(0), s.b_dtype, s.N, s.R);
      }
      t.job.a = element(bt, s.starts[i], s.b_dtype);
      t.job.a_stride = s.N;
    }
    tasks.push_back(t);
  }
  return tasks;
}

void lora_linear_backward(StableIValue* stack, uint64_t, uint64_t) {
  TensorArg dy = take_tensor(stack[0]), x = take_tensor(stack[1]), w = take_optional(stack[2]),
            a = take_tensor(stack[3]), b = take_tensor(stack[4]), scaling = take_tensor(stack[5]),
            h = take_tensor(stack[6]), mask = take_tensor(stack[7]);
  const double p = take<double>(stack[8]);
  const Splits splits = take<Splits>(stack[9]);
  const bool need_x = take<bool>(stack[10]), need_a = take<bool>(stack[11]),
             need_b = take<bool>(stack[12]), invariant = take<bool>(stack[13]);
  const Shape s = read_shape(x, a, b, splits);
  check_rows(dy, s.M, s.N, "dy");
  STD_TORCH_CHECK(dtype_of(dy, "dy") == s.dtype, "dy: expected the dtype of x");
  make_row_major(dy);
  check_rows(h, s.M, s.S * s.R, "h");
  STD_TORCH_CHECK(h.type() == type_codes().f32, "h: expected float32");
  make_row_major(h);
  if (w.defined()) check_weight(w, s);
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout_p: expected 0 <= p < 1");
  if (p > 0.0) {
    check_rows(mask, s.M, (s.K + 7) / 8, "mask");
    STD_TORCH_CHECK(mask.type() == type_codes().u8, "mask: expected uint8");
    make_contiguous(mask);
  }
  const float scale = read_scaling(scaling), kept = 1.0f / (1.0f - static_cast<float>(p));

  TensorArg dx =
      need_x ? new_tensor({s.M, s.K}, type_code(s.dtype)) : new_tensor({0}, type_code(s.dtype));
  TensorArg da = need_a ? new_like(a) : new_tensor({0}, type_code(s.a_dtype));
  TensorArg db = need_b ? new_like(b) : new_tensor({0}, type_code(s.b_dtype));
  float* g = static_cast<float*>(thread_scratch(3, s.M * s.S * s.R * 4));
  AddTask add = {};
  std::vector<DotTask> dots;
  if (need_x || need_a) dots = rank_gradient(s, dy, b, scale, invariant, g);
  std::vector<GradTask> b_grads, a_grads;
  const int64_t ranks = s.S * s.R;
  for (int64_t i = 0; need_b && i < s.S; i++) {
    GradTask t = {};
    t.job.x = element(dy.data(), s.starts[i], s.dtype);
    t.job.x_stride = dy.stride(0);
    t.job.x_dtype = s.dtype;
    t.job.g = h.as<float>() + i * s.R;
    t.job.g_stride = h.stride(0);
    t.job.M = s.M;
    t.job.R = s.R;
    t.job.alpha = scale;
    t.job.out = element(db.data(), s.starts[i] * s.R, s.b_dtype);
    t.job.out_stride = s.R;
    t.job.out_dtype = s.b_dtype;
    t.job.transposed = true;
    t.K = s.starts[i + 1] - s.starts[i];
    b_grads.push_back(t);
  }
  run_dots(dots.data(), static_cast<int64_t>(dots.size()), b_grads.data(),
           static_cast<int64_t>(b_grads.size()));
  Path path = Path::add;
  if (need_x) {
    add.job.y = dx.data();
    add.job.y_stride = s.K;
    add.job.y_dtype = s.dtype;
    add.M = s.M;
    add.N = s.K;
    if (w.defined() && s.M > 0 && s.K > 0) {
      path = path_for(s.M, w, s.dtype, true, invariant);
      add.job.accumulate = true;
      if (path == Path::panel && s.a_dtype == s.dtype) {
        add.job = panel_backward(dx, dy, w);
      } else if (path == Path::panel) {
        const AddTask task = {panel_backward(dx, dy, w), s.M, s.K};
        run_adds(&task, 1);
      } else {
        torch_backward(dx, dy, w, path);
      }
    }
    add.job.update =
        factors(g, ranks, a.data(), a.dim() == 3 ? s.K : row_stride_a(a), false, ranks);
    add.job.b_dtype = s.a_dtype;
    add.job.scale = kept;
    if (p > 0.0) {
      add.job.mask = mask.as<uint8_t>();
      add.job.mask_stride = (s.K + 7) / 8;
    }
  }
  record_path(path);
  if (need_a) {
    GradTask t = {};
    t.job.x = x.data();
    t.job.x_stride = x.stride(0);
    t.job.x_dtype = s.dtype;
    t.job.g = g;
    t.job.g_stride = ranks;
    t.job.M = s.M;
    t.job.R = ranks;
    t.job.alpha = kept;
    t.job.out = da.data();
    t.job.out_stride = s.K;
    t.job.out_dtype = s.a_dtype;
    if (p > 0.0) {
      t.job.mask = mask.as<uint8_t>();
      t.job.mask_stride = (s.K + 7) / 8;
    }
    t.K = s.K;
    a_grads.push_back(t);
  }
  run_adds_and_grads(&add, need_x ? 1 : 0, a_grads.data(), static_cast<int64_t>(a_grads.size()));
  stack[0] = give(std::move(dx));
  stack[1] = give(std::move(da));
  stack[2] = give(std::move(db));
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("lora_linear", &lora_kernels::lora_linear);
  m.impl("lora_linear_out", &lora_kernels::lora_linear_out);
  m.impl("lora_linear_train", &lora_kernels::lora_linear_train);
  m.impl("lora_linear_backward", &lora_kernels::lora_linear_backward);
  m.impl("lora_add_", &lora_kernels::lora_add);
  m.impl("lora_add_train_", &lora_kernels::lora_add_train);
}
