// The gradients of the fused linear layer for CUDA tensors: see ops_cuda_linear.cpp.
#include <tuple>

#include "cuda_linear_call.h"

namespace lora_kernels {
namespace {

// dX = dY W + s dh A: the forward kernel, W and A turned. dh (splits, m, r) = dY B.
Tensor gradient_of_x(const Tensor& dy, const MaybeTensor& weight, const Tensor& lora_a,
                     const Tensor& scaling, const Tensor& dh, const CudaTile& tile,
                     bool invariant) {
  const int64_t m = dy.size(0), n = dy.size(1), r = lora_a.size(0), k = lora_a.size(1);
  Tensor dx = torch::stable::new_empty(dy, {m, k});
  CudaLinear linear = {};
  linear.m = m;
  linear.n = k;
  linear.k = weight.has_value() ? n : 0;
  linear.r = r;
  linear.turned = true;
  linear.x = matrix(dy);
  if (weight.has_value()) linear.weight = matrix(*weight);
  linear.b = matrix(lora_a);
  linear.scaling = scaling_of(scaling, "scaling", dy);
  set_out(linear, dx, "dx", dy);
  set_h(linear, dh, tile.splits);
  run("lora_linear_backward", linear, dy, half_type(dy, "dy"), tile,
      sm90_cols(linear, dy, invariant));
  return dx;
}

// Into `gradient`, (r, cols) or, `turned`, (cols, r): scaling * u^T z. u is (splits, m, r).
void gradient_of_adapter(Tensor& gradient, bool turned, const Tensor& u, int splits,
                         const Tensor& z, const Tensor& scaling) {
  CudaGradient args = {};
  args.m = z.size(0);
  args.cols = z.size(1);
  args.r = gradient.size(turned ? 1 : 0);
  args.u = static_cast<const float*>(u.const_data_ptr());
  args.u_split = args.m * args.r;
  args.z = matrix(z);
  args.scaling = scaling_of(scaling, "scaling", z);
  args.gradient = gradient.mutable_data_ptr();
  args.row = gradient.stride(turned ? 1 : 0);
  args.col = gradient.stride(turned ? 0 : 1);
  args.splits = splits;
  args.parts = cuda_gradient_parts(args.m, args.r, args.cols, multiprocessors(z));
  // Of this call alone, so calls on several streams share nothing.
  Tensor partial = torch::stable::new_empty(z, {args.parts, args.r, args.cols}, ScalarType::Float);
  Tensor arrived =
      torch::stable::new_empty(z, {(args.r + 63) / 64, (args.cols + 63) / 64}, ScalarType::Int);
  torch::stable::zero_(arrived);
  args.partial = static_cast<float*>(partial.mutable_data_ptr());
  args.arrived = static_cast<int*>(arrived.mutable_data_ptr());
  const DType type = half_type(z, "dy");
  on_stream("lora_linear_backward", z, [&](int device, void* stream) {
    return lk_cuda_gradient(&args, type, device, stream);
  });
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(Tensor dy, Tensor x, MaybeTensor weight,
                                                        Tensor lora_a, Tensor lora_b,
                                                        Tensor scaling, Tensor h, Tensor mask,
                                                        double, Splits out_splits, bool need_x,
                                                        bool need_a, bool need_b, bool invariant) {
  no_splits(out_splits);
  STD_TORCH_CHECK(mask.numel() == 0, "mask: expected none, these kernels have no dropout");
  const DType type = half_type(dy, "dy");
  STD_TORCH_CHECK(lora_a.dim() == 2, "lora_a: expected 2 dimensions, got ", lora_a.dim());
  const int64_t m = dy.size(0), n = dy.size(1), k = x.size(1), r = lora_a.size(0);
  if (weight.has_value()) check_operand(*weight, "weight", dy, n, k);
  check_operand(x, "x", dy, m, k);
  check_operand(lora_a, "lora_a", dy, r, k);
  check_operand(lora_b, "lora_b", dy, n, r);
  if (need_b) {
    check_matrix(h, "h", dy, m, r);
    STD_TORCH_CHECK(h.scalar_type() == ScalarType::Float && h.is_contiguous(),
                    "h: expected contiguous float32");
  }
  Tensor dx = torch::stable::new_empty(dy, {0});
  Tensor da = need_a ? torch::stable::new_empty(lora_a, {r, k}) : torch::stable::new_empty(dy, {0});
  Tensor db = need_b ? torch::stable::new_empty(lora_b, {n, r}) : torch::stable::new_empty(dy, {0});
  if (need_x || need_a) {
    const CudaTile tile = choose(dy, k, n, r, invariant);
    Tensor dh = new_h(dy, r, tile.splits);
    CudaShrink shrink = shrink_of(dy, matrix(lora_b), r, dh, tile.splits);
    shrink.turned = true;
    run("lora_linear_backward", shrink, dy, type);
    if (need_x) dx = gradient_of_x(dy, weight, lora_a, scaling, dh, tile, invariant);
    if (need_a) gradient_of_adapter(da, false, dh, tile.splits, x, scaling);
  }
  if (need_b) gradient_of_adapter(db, true, h, 1, dy, scaling);
  return {dx, da, db};
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_cuda, LK_CUDA_KEY, m) {
  m.impl("lora_linear_backward", TORCH_BOX(&lora_kernels::lora_linear_backward));
}
