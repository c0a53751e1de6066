// The exact merge for a test: contiguous matrices, one adapter, no threads.
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "../cpu/merge_job.h"
#include "lora_kernels/exact.h"

namespace lora_kernels {

void* merge_scratch(size_t bytes) {
  static std::vector<char> buffer;
  if (buffer.size() < bytes + 64) buffer.resize(bytes + 64);
  const uintptr_t at = reinterpret_cast<uintptr_t>(buffer.data());
  return reinterpret_cast<void*>((at + 63) / 64 * 64);
}

}  // namespace lora_kernels

using namespace lora_kernels;

struct Problem {
  void* weight;
  const void *a, *b;
  int64_t rows, cols, rank;
  int dtype;  // of the weight; the factors are float32
  float scale;
};

namespace {

struct Term {
  Matrix weight;
  LowRank low_rank;
  explicit Term(const Problem& p) {
    void *a = const_cast<void*>(p.a), *b = const_cast<void*>(p.b);
    weight = {p.weight, static_cast<DType>(p.dtype), p.rows, p.cols, p.cols, 1};
    low_rank = {{a, DType::f32, p.rank, p.cols, p.cols, 1},
                {b, DType::f32, p.rows, p.rank, p.rank, 1},
                p.scale};
  }
};

uint8_t* allocate(void* context, size_t size) {
  std::vector<uint8_t>& body = *static_cast<std::vector<uint8_t>*>(context);
  body.resize(size);
  return body.data();
}

}  // namespace

extern "C" {

// The body's bytes, which are kept until the next call; below zero where it is refused.
int64_t lk_merge(const Problem* problem, const uint8_t** body) {
  static std::vector<uint8_t> kept;
  const Term term(*problem);
  const ExactBody out = {allocate, &kept};
  kept.clear();
  const ExactResult result = exact_pass(term.weight, nullptr, nullptr, 0, &term.low_rank, &out);
  *body = kept.data();
  return result.status == ExactStatus::ok ? static_cast<int64_t>(kept.size())
                                          : -static_cast<int64_t>(result.status);
}

int lk_unmerge(const Problem* problem, const uint8_t* body, int64_t size) {
  const Term term(*problem);
  return static_cast<int>(
      exact_pass(term.weight, &term.low_rank, body, static_cast<size_t>(size), nullptr, nullptr)
          .status);
}
}
