// The fused linear ops for CUDA tensors on LibTorch's stable ABI: checks, pointers, the current
// stream, two launches (h, then the product). Registered under the namespace lora_kernels_cuda:
// ops/cuda_choice.py picks between them and Triton. What these kernels do not take
// (lora_kernels/ops/cuda_backend.py) is refused here too.
#include <tuple>

#include "cuda_linear_call.h"

namespace lora_kernels {
namespace {

// One slot of a bank.
CudaMatrix slot_matrix(const Tensor& t) { return {t.const_data_ptr(), t.stride(1), t.stride(2)}; }

CudaPlan plan_of(const Tensor& row_order, const Tensor& segment_starts, const MaybeTensor& ranks,
                 const Tensor& x, int64_t slots) {
  const auto check = [&](const Tensor& t, const char* name) {
    check_device(t, name, x);
    STD_TORCH_CHECK(t.dim() == 1 && t.scalar_type() == ScalarType::Int && t.is_contiguous(), name,
                    ": expected contiguous int32 in one dimension");
  };
  check(row_order, "row_order");
  check(segment_starts, "segment_starts");
  STD_TORCH_CHECK(segment_starts.size(0) == slots + 2, "segment_starts: expected ", slots + 2,
                  " for a bank of ", slots, " slots, got ", segment_starts.size(0));
  STD_TORCH_CHECK(row_order.size(0) >= x.size(0), "row_order: expected at least ", x.size(0));
  if (ranks.has_value()) {
    check(*ranks, "slot_ranks");
    STD_TORCH_CHECK(ranks->size(0) == slots, "slot_ranks: expected ", slots);
  }
  return {static_cast<const int32_t*>(row_order.const_data_ptr()),
          static_cast<const int32_t*>(segment_starts.const_data_ptr()),
          ranks.has_value() ? static_cast<const int32_t*>(ranks->const_data_ptr()) : nullptr,
          static_cast<int>(row_order.size(0)),
          static_cast<int>(slots),
          nullptr};
}

// y of one adapter; without a weight y += the update alone. `saved`, if not null, is h (m, r), kept
// for the backward pass.
void one_adapter(const char* op, Tensor& y, const char* y_name, const Tensor& x,
                 const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& lora_a,
                 const Tensor& lora_b, const Tensor& scaling, bool invariant,
                 Tensor* saved = nullptr) {
  const DType type = half_type(x, "x");
  STD_TORCH_CHECK(lora_a.dim() == 2, "lora_a: expected 2 dimensions, got ", lora_a.dim());
  const int64_t m = x.size(0), k = x.size(1), r = lora_a.size(0);
  const int64_t n = weight.has_value() ? weight->size(0) : lora_b.size(0);
  if (weight.has_value()) check_operand(*weight, "weight", x, n, k);
  check_operand(lora_a, "lora_a", x, r, k);
  check_operand(lora_b, "lora_b", x, n, r);
  const CudaTile tile = choose(x, n, weight.has_value() ? k : 0, r, invariant);
  const int splits = saved == nullptr ? choose(x, n, k, r, invariant).splits : 1;
  CudaLinear linear = {};
  linear.m = m;
  linear.n = n;
  linear.r = r;
  linear.x = matrix(x);
  if (weight.has_value()) {
    linear.k = k;
    linear.weight = matrix(*weight);
  }
  linear.add = !weight.has_value();
  linear.b = matrix(lora_b);
  linear.scaling = scaling_of(scaling, "scaling", x);
  set_bias(linear, bias, x);
  set_out(linear, y, y_name, x);
  Tensor h = saved == nullptr ? new_h(x, r, splits) : *saved;
  set_h(linear, h, splits);
  run(op, shrink_of(x, matrix(lora_a), r, h, splits), linear, x, type, tile, invariant);
}

Tensor lora_linear(Tensor x, Tensor weight, MaybeTensor bias, Tensor lora_a, Tensor lora_b,
                   Tensor scaling, Splits out_splits, bool invariant) {
  no_splits(out_splits);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x, weight: expected 2 dimensions");
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  one_adapter("lora_linear", y, "y", x, weight, bias, lora_a, lora_b, scaling, invariant);
  return y;
}

void lora_linear_out(Tensor out, Tensor x, Tensor weight, MaybeTensor bias, Tensor lora_a,
                     Tensor lora_b, Tensor scaling, Splits out_splits, bool invariant) {
  no_splits(out_splits);
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected 2 dimensions, got ", weight.dim());
  one_adapter("lora_linear_out", out, "out", x, weight, bias, lora_a, lora_b, scaling, invariant);
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_train(Tensor x, Tensor weight, MaybeTensor bias,
                                                     Tensor lora_a, Tensor lora_b, Tensor scaling,
                                                     double dropout_p, MaybeTensor /*seed*/,
                                                     Splits out_splits, bool invariant) {
  no_splits(out_splits);
  STD_TORCH_CHECK(dropout_p == 0, "dropout_p: expected 0, got ", dropout_p);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x, weight: expected 2 dimensions");
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  Tensor h = torch::stable::new_empty(x, {x.size(0), lora_a.size(0)}, ScalarType::Float);
  one_adapter("lora_linear_train", y, "y", x, weight, bias, lora_a, lora_b, scaling, invariant, &h);
  return {y, h, torch::stable::new_empty(x, {0}, ScalarType::Byte)};
}

void lora_add_(Tensor y, Tensor x, Tensor lora_a, Tensor lora_b, Tensor scaling, bool invariant) {
  STD_TORCH_CHECK(lora_b.dim() == 2, "lora_b: expected 2 dimensions, got ", lora_b.dim());
  one_adapter("lora_add_", y, "y", x, std::nullopt, std::nullopt, lora_a, lora_b, scaling,
              invariant);
}

CudaShrink bank_shrink(const Tensor& x, const Tensor& a_bank, Tensor& h, int splits,
                       const CudaPlan& plan) {
  CudaShrink shrink = shrink_of(x, slot_matrix(a_bank), a_bank.size(1), h, splits);
  shrink.a_slot = a_bank.stride(0);
  shrink.plan = plan;
  return shrink;
}

void check_bank(const Tensor& bank, const char* name, const Tensor& x) {
  check_device(bank, name, x);
  STD_TORCH_CHECK(bank.dim() == 3, name, ": expected 3 dimensions, got ", bank.dim());
  STD_TORCH_CHECK(bank.scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
}

void set_scalings(CudaLinear& linear, const Tensor& scalings, const Tensor& x, int64_t slots) {
  check_device(scalings, "slot_scalings", x);
  STD_TORCH_CHECK(scalings.dim() == 1 && scalings.size(0) == slots &&
                      scalings.scalar_type() == ScalarType::Float,
                  "slot_scalings: expected ", slots, " float32");
  linear.scaling = static_cast<const float*>(scalings.const_data_ptr());
  linear.scaling_stride = scalings.stride(0);
}

Tensor multi_lora_linear(Tensor x, Tensor weight, MaybeTensor bias, Tensor a_bank, Tensor b_bank,
                         Tensor slot_scalings, MaybeTensor slot_ranks, Tensor row_order,
                         Tensor segment_starts, Splits out_splits, bool invariant) {
  no_splits(out_splits);
  const DType type = half_type(x, "x");
  check_bank(a_bank, "a_bank", x);
  check_bank(b_bank, "b_bank", x);
  const int64_t slots = a_bank.size(0), r = a_bank.size(1), k = x.size(1);
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected 2 dimensions, got ", weight.dim());
  const int64_t n = weight.size(0);
  check_operand(weight, "weight", x, n, k);
  STD_TORCH_CHECK(a_bank.size(2) == k, "a_bank: expected ", k, " in_features");
  STD_TORCH_CHECK(b_bank.size(0) == slots && b_bank.size(1) == n && b_bank.size(2) == r,
                  "b_bank: expected (", slots, ", ", n, ", ", r, ")");
  const CudaPlan plan = plan_of(row_order, segment_starts, slot_ranks, x, slots);
  Tensor y = torch::stable::new_empty(x, {x.size(0), n});
  const CudaTile tile = choose(x, n, k, r, invariant);
  Tensor h = new_h(x, r, tile.splits);
  CudaLinear linear = {};
  linear.m = x.size(0);
  linear.n = n;
  linear.k = k;
  linear.r = slots > 0 ? r : 0;
  linear.x = matrix(x);
  linear.weight = matrix(weight);
  linear.b = slot_matrix(b_bank);
  linear.b_slot = b_bank.stride(0);
  linear.plan = plan;
  set_scalings(linear, slot_scalings, x, slots);
  set_bias(linear, bias, x);
  set_out(linear, y, "y", x);
  set_h(linear, h, tile.splits);
  run("multi_lora_linear", bank_shrink(x, a_bank, h, tile.splits, plan), linear, x, type, tile,
      invariant);
  return y;
}

Tensor lora_shrink(Tensor x, Tensor a_bank, MaybeTensor slot_ranks, Tensor row_order,
                   Tensor segment_starts, bool) {
  const DType type = half_type(x, "x");
  check_bank(a_bank, "a_bank", x);
  STD_TORCH_CHECK(a_bank.size(2) == x.size(1), "a_bank: expected ", x.size(1), " in_features");
  const CudaPlan plan = plan_of(row_order, segment_starts, slot_ranks, x, a_bank.size(0));
  Tensor h = torch::stable::new_empty(x, {x.size(0), a_bank.size(1)}, ScalarType::Float);
  torch::stable::zero_(h);
  run("lora_shrink", bank_shrink(x, a_bank, h, 1, plan), x, type);
  return h;
}

void lora_expand_(Tensor y, Tensor h, Tensor b_bank, Tensor slot_scalings, MaybeTensor slot_ranks,
                  Tensor row_order, Tensor segment_starts, Splits out_splits, bool invariant) {
  no_splits(out_splits);
  const DType type = half_type(y, "y");
  check_bank(b_bank, "b_bank", y);
  const int64_t slots = b_bank.size(0), n = y.size(1), r = b_bank.size(2), m = y.size(0);
  STD_TORCH_CHECK(b_bank.size(1) == n, "b_bank: expected ", n, " out_features");
  check_matrix(h, "h", y, m, r);
  STD_TORCH_CHECK(h.scalar_type() == ScalarType::Float && h.is_contiguous(),
                  "h: expected contiguous float32");
  const CudaPlan plan = plan_of(row_order, segment_starts, slot_ranks, y, slots);
  CudaLinear linear = {};
  linear.m = m;
  linear.n = n;
  linear.r = slots > 0 ? r : 0;
  linear.add = true;
  linear.x = matrix(y);  // not read: its part of the sum is empty
  linear.b = slot_matrix(b_bank);
  linear.b_slot = b_bank.stride(0);
  linear.plan = plan;
  set_scalings(linear, slot_scalings, y, slots);
  set_out(linear, y, "y", y);
  set_h(linear, h, 1);
  run("lora_expand_", linear, y, type, choose(y, n, 0, r, invariant), 0);
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_cuda, LK_CUDA_KEY, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_kernels::lora_linear));
  m.impl("lora_linear_out", TORCH_BOX(&lora_kernels::lora_linear_out));
  m.impl("lora_linear_train", TORCH_BOX(&lora_kernels::lora_linear_train));
  m.impl("lora_add_", TORCH_BOX(&lora_kernels::lora_add_));
  m.impl("multi_lora_linear", TORCH_BOX(&lora_kernels::multi_lora_linear));
  m.impl("lora_shrink", TORCH_BOX(&lora_kernels::lora_shrink));
  m.impl("lora_expand_", TORCH_BOX(&lora_kernels::lora_expand_));
}
