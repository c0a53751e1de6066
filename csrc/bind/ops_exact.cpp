// merge_exact_, unmerge_exact_ and switch_exact_ for CPU tensors. What the data decides (an Inf, a
// residual that does not fit) comes back as a status (code, block), which the public functions turn
// into errors. The schemas are in lora_kernels/ops/library.py.
#include "lora_kernels/exact.h"
#include "low_rank_arg.h"

namespace lora_kernels {
namespace {

TensorArg status_tensor(const ExactResult& result) {
  TensorArg status = new_tensor({2}, type_codes().i64);
  status.as<int64_t>()[0] = static_cast<int64_t>(result.status);
  status.as<int64_t>()[1] = result.block;
  return status;
}

struct Body {
  TensorArg tensor;
  ExactBody hook = {&allocate, this};
  static uint8_t* allocate(void* context, size_t size) {
    TensorArg& t = static_cast<Body*>(context)->tensor;
    t = new_tensor({static_cast<int64_t>(size)}, type_codes().u8);
    return t.as<uint8_t>();
  }
  TensorArg take() {
    if (!tensor.defined()) tensor = new_tensor({0}, type_codes().u8);
    return std::move(tensor);
  }
};

const uint8_t* body_bytes(const TensorArg& body) {
  STD_TORCH_CHECK(body.dim() == 1 && body.type() == type_codes().u8 && body.contiguous(),
                  "body: expected contiguous bytes in one dimension");
  return body.as<uint8_t>();
}

void merge_exact_op(StableIValue* stack, uint64_t, uint64_t) {
  const Args<4> args(stack);
  const Matrix w = weight_matrix(args.tensor[0]);
  const LowRank term = low_rank(args.tensor + 1, kOnly, 1.0, w);
  Body body;
  const ExactResult result = exact_pass(w, nullptr, nullptr, 0, &term, &body.hook);
  stack[0] = give(body.take());
  stack[1] = give(status_tensor(result));
}

void unmerge_exact_op(StableIValue* stack, uint64_t, uint64_t) {
  const Args<5> args(stack);
  const Matrix w = weight_matrix(args.tensor[0]);
  const LowRank term = low_rank(args.tensor + 1, kOnly, 1.0, w);
  const TensorArg& body = args.tensor[4];
  const ExactResult result =
      exact_pass(w, &term, body_bytes(body), static_cast<size_t>(body.size(0)), nullptr, nullptr);
  stack[0] = give(status_tensor(result));
}

void switch_exact_op(StableIValue* stack, uint64_t, uint64_t) {
  const Args<8> args(stack);
  const Matrix w = weight_matrix(args.tensor[0]);
  const LowRank before = low_rank(args.tensor + 1, kOld, 1.0, w);
  const LowRank after = low_rank(args.tensor + 4, kNew, 1.0, w);
  const TensorArg& old_body = args.tensor[7];
  Body body;
  const ExactResult result = exact_pass(w, &before, body_bytes(old_body),
                                        static_cast<size_t>(old_body.size(0)), &after, &body.hook);
  stack[0] = give(body.take());
  stack[1] = give(status_tensor(result));
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("merge_exact_", &lora_kernels::merge_exact_op);
  m.impl("unmerge_exact_", &lora_kernels::unmerge_exact_op);
  m.impl("switch_exact_", &lora_kernels::switch_exact_op);
}
