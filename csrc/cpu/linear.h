// Linear-layer products over torch's threads: each call splits one or more jobs by index alone.
// Empty shapes are legal everywhere.
#pragma once

#include "linear_jobs.h"

namespace lora_kernels {

struct DotTask {
  DotJob job;
  int64_t M, R;
  bool by_rows;  // in row form (paths.h: shrink_by_rows), else in dot form
};

struct GradTask {
  GradJob job;
  int64_t K;
};

// All products in one parallel region; gradients, which do not need them, as well.
void run_dots(const DotTask* tasks, int64_t count, const GradTask* grads = nullptr,
              int64_t num_grads = 0);
// Whether the task can have its A stored (K, R): DotJob::a_by_rows.
bool takes_a_by_rows(const DotTask& task);

// The dropout bits that a shrink draws for its rows before it reads them: job.mask, written.
struct Draw {
  uint8_t* mask;
  uint64_t seed;
  uint32_t threshold;
};
void run_dots_with_dropout(const DotTask& task, const Draw& draw);

// y = x w^T with the updates inside. Slice s owns the columns [starts[s], starts[s + 1]) and the
// updates [s * M, (s + 1) * M) of job.updates; its b rows count from the first column of y.
void run_base(const BaseJob& job, int64_t M, const int64_t* starts, int64_t slices);

struct AddTask {
  AddJob job;
  int64_t M, N;
};

// Tasks must not share elements of y. One region; threads take ranges of columns.
void run_adds(const AddTask* tasks, int64_t count);

// A shrink, then the adds that take its result; for many rows one region, whose threads take ranges
// of them. `draw` may be null. The rows of the adds are all those of the shrink.
void run_update(const DotTask& shrink, const Draw* draw, const AddTask* adds, int64_t count);

// The N columns of y from rows of x and of h, which are packed on the way: `x` and `h` say where
// they lie, job.panels and job.h are not set.
struct TurnTask {
  TurnJob job;
  int64_t N;
  PackJob x, h;
};

// `shrink`, where given, is done first; its result is the task's h.
void run_turn(const TurnTask& task, const DotTask* shrink = nullptr, const Draw* draw = nullptr);
// Whether the update by a B of that dtype can join the product; job.updates always can.
bool turn_adds(DType w, DType b);

// The adds and the gradients are independent of one another; one region for all.
void run_adds_and_grads(const AddTask* adds, int64_t num_adds, const GradTask* grads,
                        int64_t num_grads);

// out (R, N) <- b (N, R).
void run_transpose(void* out, int64_t out_stride, const void* b, int64_t b_stride, DType dtype,
                   int64_t N, int64_t R);

}  // namespace lora_kernels
