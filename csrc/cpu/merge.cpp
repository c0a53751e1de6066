// Merge family, the part that is the same on every instruction set.
//
// The kernels want neighbouring columns of W side by side in memory. A weight stored by columns
// (stride(0) == 1) is the transposed problem, W^T += A^T B^T, with the roles of A and B swapped and
// no copy of anything.
#include <cstdlib>
#include <new>
#include <vector>

#include "lora_kernels/isa.h"
#include "merge_job.h"

LK_DECLARE_FOR_ISAS(void merge_jobs(const MergeJob* jobs, size_t count);
                    bool merge_finite_job(const MergeJob& job);)

namespace lora_kernels {
namespace {

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

Matrix transposed(const Matrix& m) {
  return {m.data, m.dtype, m.cols, m.rows, m.col_stride, m.row_stride};
}

// W by rows from here on.
MergeJob make_merge_job(const Matrix& w, const LowRank* terms, int num_terms) {
  MergeJob job = {w, {}, num_terms, false};
  for (int t = 0; t < num_terms; ++t) job.terms[t] = terms[t];
  if (w.row_stride == 1 ? w.col_stride != 1 || w.cols == 1 : w.rows == 1 && w.col_stride != 1) {
    job.w = transposed(w);
    job.transposed = true;
    for (int t = 0; t < job.num_terms; ++t) {
      const LowRank term = job.terms[t];
      job.terms[t] = {transposed(term.b), transposed(term.a), term.scale};
    }
  }
  if (job.w.cols == 1) job.w.col_stride = 1;
  return job;
}

}  // namespace

void* merge_scratch(size_t bytes) {
  thread_local Buffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, buffer.size);
    if (buffer.data == nullptr) {
      buffer.size = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.data;
}

void merge(const Merge* merges, size_t count) {
  static const auto kernel = LK_SELECT_ISA(merge_jobs);
  std::vector<MergeJob> jobs;
  for (size_t i = 0; i < count; ++i) {
    const Matrix& w = merges[i].w;
    if (w.rows > 0 && w.cols > 0) {
      jobs.push_back(make_merge_job(w, merges[i].terms, merges[i].num_terms));
    }
  }
  kernel(jobs.data(), jobs.size());
}

bool merge_is_finite(const Matrix& w, const LowRank& term) {
  static const auto kernel = LK_SELECT_ISA(merge_finite_job);
  return w.rows == 0 || w.cols == 0 || kernel(make_merge_job(w, &term, 1));
}

}  // namespace lora_kernels
