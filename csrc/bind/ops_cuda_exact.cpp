// merge_exact_, unmerge_exact_ and switch_exact_ for CUDA tensors on LibTorch's stable ABI. What
// the data decides comes back as a status (code, block), as on the CPU: the public functions turn
// it into errors. The host waits for the size of what a merge records.
#include <tuple>

#include "cuda_term.h"
#include "lora_kernels/cuda_exact.h"

namespace lora_kernels {
namespace {

constexpr const char* kOp = "exact merge";

Tensor bytes(const Tensor& weight, int64_t size) {
  return torch::stable::new_empty(weight, {size}, ScalarType::Byte);
}

// A weight with one adapter, and the memory that a pass over it needs.
struct Exact {
  Tensor weight, workspace, status;
  CudaExact args = {};

  Exact(Tensor& w, const TermNames& names, const Tensor& a, const Tensor& b, const Tensor& scaling)
      : weight(w) {
    STD_TORCH_CHECK(w.dim() == 2, "weight: expected 2 dimensions, got ", w.dim());
    args.weight_type = dtype_of(w, "weight");
    args.term = cuda_term(w, names, a, b, scaling, 1.0);
    args.weight = w.mutable_data_ptr();
    args.n = w.size(0);
    args.k = w.size(1);
    args.weight_row = w.stride(0);
    args.weight_col = w.stride(1);
    const int64_t size = lk_cuda_exact_workspace(args.n, args.k);
    workspace = torch::stable::new_empty(w, {(size + 7) / 8}, ScalarType::Long);
    args.workspace = workspace.mutable_data_ptr();
    status = torch::stable::new_empty(w, {2}, ScalarType::Long);
  }

  // Merges; the body, or an empty one where that was refused.
  Tensor merge() {
    on_stream(kOp, weight, [&](int device, void* stream) {
      return lk_cuda_exact_measure(&args, &args.body_size, device, stream);
    });
    Tensor body = bytes(weight, args.body_size);
    if (read_status(true)) {
      args.body = static_cast<uint8_t*>(body.mutable_data_ptr());
      write();
    }
    return body;
  }
  void write() {
    on_stream(kOp, weight,
              [&](int device, void* stream) { return lk_cuda_exact_write(&args, device, stream); });
  }
  void undo(const Tensor& body) {
    STD_TORCH_CHECK(
        body.dim() == 1 && body.scalar_type() == ScalarType::Byte && body.is_contiguous(),
        "body: expected contiguous bytes in one dimension");
    check_device(body, "body", weight);
    args.body = static_cast<uint8_t*>(const_cast<void*>(body.const_data_ptr()));
    args.body_size = body.size(0);
    on_stream(kOp, weight,
              [&](int device, void* stream) { return lk_cuda_exact_undo(&args, device, stream); });
  }
  // Fills `status`; with `wait` also says whether all went well.
  bool read_status(bool wait) {
    bool ok = true;
    int64_t* to = static_cast<int64_t*>(status.mutable_data_ptr());
    on_stream(kOp, weight, [&](int device, void* stream) {
      return lk_cuda_exact_status(&args, to, wait ? &ok : nullptr, device, stream);
    });
    return ok;
  }
};

std::tuple<Tensor, Tensor> merge_exact_(Tensor weight, Tensor lora_a, Tensor lora_b,
                                        Tensor scaling) {
  Exact exact(weight, kOnlyTerm, lora_a, lora_b, scaling);
  Tensor body = exact.merge();
  return {body, exact.status};
}

Tensor unmerge_exact_(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor body) {
  Exact exact(weight, kOnlyTerm, lora_a, lora_b, scaling);
  exact.undo(body);
  exact.read_status(false);
  return exact.status;
}

// The weight is passed over twice. When the second merge is refused the first is made again, which
// gives the bits there were.
std::tuple<Tensor, Tensor> switch_exact_(Tensor weight, Tensor old_a, Tensor old_b,
                                         Tensor old_scaling, Tensor new_a, Tensor new_b,
                                         Tensor new_scaling, Tensor body) {
  Exact before(weight, kOldTerm, old_a, old_b, old_scaling);
  Exact after(weight, kNewTerm, new_a, new_b, new_scaling);
  before.undo(body);
  if (!before.read_status(true)) return {bytes(weight, 0), before.status};
  Tensor made = after.merge();
  if (!after.read_status(true)) {
    before.args.body = nullptr;
    before.write();
  }
  return {made, after.status};
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_cuda, LK_CUDA_KEY, m) {
  m.impl("merge_exact_", TORCH_BOX(&lora_kernels::merge_exact_));
  m.impl("unmerge_exact_", TORCH_BOX(&lora_kernels::unmerge_exact_));
  m.impl("switch_exact_", TORCH_BOX(&lora_kernels::switch_exact_));
}
