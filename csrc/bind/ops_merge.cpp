// merge_, merge_list_, merge_is_finite, switch_ and dropout_mask for CPU tensors: arguments
// checked, then raw pointers to the kernels. The schemas are in lora_kernels/ops/library.py.
#include <cmath>

#include "lora_kernels/merge.h"
#include "low_rank_arg.h"

namespace lora_kernels {
namespace {

// weight, lora_a, lora_b, scaling.
Merge merge_of(const TensorArg* args, double sign) {
  Merge one = {weight_matrix(args[0]), {}, 1};
  one.terms[0] = low_rank(args + 1, kOnly, sign, one.w);
  return one;
}

void merge_op(StableIValue* stack, uint64_t, uint64_t) {
  const double sign = take<double>(stack[4]);
  const Args<4> args(stack);
  const Merge one = merge_of(args.tensor, sign);
  merge(&one, 1);
}

// Every weight and factor is checked before the first weight is written.
void merge_list_op(StableIValue* stack, uint64_t, uint64_t) {
  const double sign = take<double>(stack[4]);
  constexpr size_t kParts = 4;
  std::vector<TensorArg> lists[kParts];
  for (size_t part = 0; part < kParts; ++part) lists[part] = take_list(stack[part]);
  const size_t count = lists[0].size();
  std::vector<TensorArg> args(kParts * count);
  for (size_t part = 0; part < kParts; ++part) {
    STD_TORCH_CHECK(lists[part].size() == count,
                    "merge_list_: expected as many lora_a, lora_b and ", "scalings as weights (",
                    count, "), got ", lists[part].size());
    for (size_t i = 0; i < count; ++i) args[kParts * i + part] = std::move(lists[part][i]);
  }
  for (TensorArg& arg : args) arg.read();
  std::vector<Merge> merges;
  for (size_t i = 0; i < count; ++i) merges.push_back(merge_of(&args[kParts * i], sign));
  merge(merges.data(), count);
}

void merge_is_finite_op(StableIValue* stack, uint64_t, uint64_t) {
  const double sign = take<double>(stack[4]);
  const Args<4> args(stack);
  const Matrix w = matrix(args.tensor[0], "weight");
  const LowRank term = low_rank(args.tensor + 1, kOnly, sign, w);
  TensorArg answer = new_tensor({}, aoti_torch_dtype_bool());
  *answer.as<bool>() = merge_is_finite(w, term);
  stack[0] = give(std::move(answer));
}

void switch_op(StableIValue* stack, uint64_t, uint64_t) {
  const Args<7> args(stack);
  Merge both = {weight_matrix(args.tensor[0]), {}, 2};
  both.terms[0] = low_rank(args.tensor + 1, kOld, -1.0, both.w);
  both.terms[1] = low_rank(args.tensor + 4, kNew, 1.0, both.w);
  merge(&both, 1);
}

void dropout_mask_op(StableIValue* stack, uint64_t, uint64_t) {
  const int64_t rows = take<int64_t>(stack[1]), cols = take<int64_t>(stack[2]);
  const double p = take<double>(stack[3]);
  const Args<1> args(stack);
  const TensorArg& seed = args.tensor[0];
  STD_TORCH_CHECK(seed.dim() == 0 && seed.type() == type_codes().i64,
                  "seed: expected a 0-d int64 tensor");
  STD_TORCH_CHECK(rows >= 0 && cols >= 0, "num_rows, num_cols: expected at least 0, got ", rows,
                  ", ", cols);
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "p: expected a probability in [0, 1), got ", p);
  const int64_t bytes = (cols + 7) / 8;
  TensorArg mask = new_tensor({rows, bytes}, type_codes().u8);
  const uint64_t key = static_cast<uint64_t>(*seed.as<int64_t>());
  const uint32_t threshold = static_cast<uint32_t>(std::nearbyint(p * 65536.0));
  const int64_t grain = bytes > 0 ? 8192 / bytes + 1 : rows;
  uint8_t* out = mask.as<uint8_t>();
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    dropout_mask(out, rows, cols, key, threshold, begin, end);
  });
  stack[0] = give(std::move(mask));
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("merge_", &lora_kernels::merge_op);
  m.impl("merge_list_", &lora_kernels::merge_list_op);
  m.impl("merge_is_finite", &lora_kernels::merge_is_finite_op);
  m.impl("switch_", &lora_kernels::switch_op);
  m.impl("dropout_mask", &lora_kernels::dropout_mask_op);
}
