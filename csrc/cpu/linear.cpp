// Splits the linear jobs over threads and picks the kernels of the running instruction set.
//
// A region costs a few microseconds, so work below kGrainCost (in vector products, about as many
// cycles) stays on the calling thread. Splits are by index: which thread computes an element never
// changes how it is computed.
#include "linear.h"

#include <cstdlib>
#include <new>

#include "lora_kernels/isa.h"

LK_DECLARE_FOR_ISAS(
    void dot_kernel(const DotJob& job, int64_t m0, int64_t m1, int64_t j0, int64_t j1);
    void shrink_kernel(const DotJob& job, int64_t m0, int64_t m1, int64_t R);
    void base_kernel(const BaseJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1);
    void add_kernel(const AddJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1);
    void grad_kernel(const GradJob& job, int64_t k0, int64_t k1);
    void pack_kernel(const PackJob& job, int64_t k0, int64_t k1);
    void turn_kernel(const TurnJob& job, int64_t n0, int64_t n1);
    void transpose_kernel(void* out, int64_t out_stride, const void* b, int64_t b_stride,
                          DType dtype, int64_t R, int64_t n0, int64_t n1);)

#ifdef LK_HAVE_AMX
namespace lora_kernels::amx {
void shrink_kernel(const DotJob& job, int64_t m0, int64_t m1, int64_t R);
void add_kernel(const AddJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1);
void grad_kernel(const GradJob& job, int64_t k0, int64_t k1);
void pack_kernel(const PackJob& job, int64_t k0, int64_t k1);
void turn_kernel(const TurnJob& job, int64_t n0, int64_t n1);
}  // namespace lora_kernels::amx
// Calls the kernel on tiles where `tiled`, else that of the instruction set.
#define LK_RUN(function, tiled, ...)                             \
  do {                                                           \
    static const auto kernel_ = LK_SELECT_ISA(function);         \
    (tiled) ? amx::function(__VA_ARGS__) : kernel_(__VA_ARGS__); \
  } while (false)
#else
#define LK_RUN(function, tiled, ...)                     \
  do {                                                   \
    static const auto kernel_ = LK_SELECT_ISA(function); \
    (void)(tiled);                                       \
    kernel_(__VA_ARGS__);                                \
  } while (false)
#endif

namespace lora_kernels {
namespace {

// Whether a job's kernel is the one on tiles: bf16 on both sides.
bool on_tiles(DType x, DType other) {
  static const bool has = isa() == Isa::amx;
  return has && x == DType::bf16 && other == DType::bf16;
}
bool on_tiles(const DotJob& job) { return on_tiles(job.x_dtype, job.a_dtype); }
bool on_tiles(const AddJob& job) { return on_tiles(job.y_dtype, job.b_dtype); }
bool on_tiles(const GradJob& job) { return on_tiles(job.x_dtype, job.out_dtype); }
bool on_tiles(const PackJob& job) { return on_tiles(job.w_dtype, job.w_dtype); }
bool on_tiles(const TurnJob& job) { return on_tiles(job.w_dtype, job.w_dtype); }

constexpr int64_t kGrainCost = 12000;
constexpr int64_t kDotRows = 6,
                  kDotCols = 8;  // the dot kernel's rows, and a multiple of its columns
constexpr int64_t kShrinkRows = 24, kTileRows = 32;  // that the row form takes at a time
constexpr int64_t kAddCols = 64, kAddRows = 6;       // one panel
constexpr int64_t kManyRows = 64;                    // from where rows are split before columns
constexpr int64_t kGradCols = 64;                    // a multiple of what they load together
constexpr int64_t kTurnCols = 48;                    // made together by the turned form
constexpr int64_t kPackCols = 32;                    // packed together
constexpr int64_t kL2Elements = 1 << 19;             // of a W that stays in L2
constexpr int64_t kBaseCols = 24;                    // a multiple of most tiles' columns

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Part i of `parts` of n items in whole blocks of `size`: [begin, end).
struct Range {
  int64_t begin, end;
};
Range part(int64_t n, int64_t size, int64_t i, int64_t parts) {
  const int64_t count = blocks(n, size);
  return {least(n, count * i / parts * size), least(n, count * (i + 1) / parts * size)};
}

// body(i, parts) for i in [0, parts): one part a thread, or a single one for little work.
template <class Body>
void for_parts(int64_t cost, const Body& body) {
  const int64_t threads = cost < 2 * kGrainCost ? 1 : thread_count();
  const int64_t parts = threads < 1 ? 1 : least(threads, cost / kGrainCost + 1);
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(i, parts);
  });
}

int64_t unit(const DotJob& job) { return on_tiles(job) ? kTileRows : kShrinkRows; }

int64_t lanes(int64_t n) { return blocks(n, 16); }

int64_t cost_of(const DotTask& t) { return t.M * t.R * lanes(t.job.K); }
int64_t cost_of(const AddTask& t) { return t.M * lanes(t.N) * (t.job.update.R + t.job.base.R + 4); }
int64_t cost_of(const GradTask& t) { return t.job.M * lanes(t.K) * (t.job.R + 2); }

void shrink_rows(const DotTask& t, const Draw* draw, Range m) {
  static const auto dot = LK_SELECT_ISA(dot_kernel);
  if (m.begin >= m.end) return;
  if (!t.by_rows) {
    for (int64_t row = m.begin; row < m.end; row += kDotRows) {
      const int64_t end = least(m.end, row + kDotRows);
      if (draw) dropout_mask(draw->mask, t.M, t.job.K, draw->seed, draw->threshold, row, end);
      dot(t.job, row, end, 0, t.R);
    }
    return;
  }
  if (draw) dropout_mask(draw->mask, t.M, t.job.K, draw->seed, draw->threshold, m.begin, m.end);
  LK_RUN(shrink_kernel, on_tiles(t.job), t.job, m.begin, m.end, t.R);
}

// Few columns: the rows are split as well, and each part packs its columns again. An update alone
// is quickly packed: where there are rows enough they are split, as by run_update.
void add_part(const AddTask& t, int64_t i, int64_t parts) {
  if (t.M <= 0 || t.N <= 0 || (t.job.accumulate && t.job.update.R + t.job.base.R <= 0)) return;
  const bool by_rows = t.job.base.R == 0 && t.M >= kManyRows;
  int64_t by_col = by_rows ? 1 : least(parts, blocks(t.N, kAddCols));
  while (parts % by_col != 0) by_col--;
  const int64_t by_row = parts / by_col;
  const Range m = part(t.M, kAddRows, i / by_col, by_row);
  const Range n = part(t.N, kAddCols, i % by_col, by_col);
  if (m.begin < m.end && n.begin < n.end) {
    LK_RUN(add_kernel, on_tiles(t.job), t.job, m.begin, m.end, n.begin, n.end);
  }
}

void grad_part(const GradTask& t, int64_t i, int64_t parts) {
  if (t.K <= 0 || t.job.R <= 0) return;
  const Range k = part(t.K, kGradCols, i, parts);
  if (k.begin < k.end) LK_RUN(grad_kernel, on_tiles(t.job), t.job, k.begin, k.end);
}

// Slots of thread_scratch: packed x, packed h, and a thread's own h.
constexpr int kXSlot = 4, kHSlot = 5, kOwnHSlot = 6;

void* panels_for(const PackJob& job, int slot) {
  const int64_t size = on_tiles(job) ? 2 * blocks(job.K, kPackCols) * kPackCols : 4 * job.K;
  return thread_scratch(slot, blocks(job.M, kTurnRows) * kTurnRows * size);
}

// Rows [m.begin, m.end), packed by the calling thread.
const void* pack_all(PackJob job, Range m, int slot) {
  job.x = element(job.x, m.begin * job.x_stride, job.x_dtype);
  job.M = m.end - m.begin;
  job.panels = panels_for(job, slot);
  if (job.K > 0) LK_RUN(pack_kernel, on_tiles(job), job, 0, job.K);
  return job.panels;
}

// Whether threads split the rows of a turned product, not its columns: each packs only its own rows
// of x, and what is small stays in its own cache. All of them read all of W, so it must be small.
bool turns_by_rows(const TurnTask& t) {
  return t.job.M >= kManyRows && t.N * t.job.K <= kL2Elements;
}

// Whether each thread packs all rows of x, and makes h of them, for its own columns: of few rows
// that costs less than a region more, or than reading what another core has just written.
bool turns_at_once(const TurnTask& task, const DotTask* shrink, const Draw* draw) {
  if (!on_tiles(task.job) || task.job.M > kTileRows || draw != nullptr) return false;
  return shrink == nullptr || (shrink->job.a_dtype == DType::bf16 && shrink->job.alpha == 1.0f);
}

// h of the rows that are packed already, as a turned product with A: where the task wants it, or in
// scratch of the thread.
const float* turn_shrink(const DotTask& shrink, const void* panels, int64_t M, bool wanted) {
  TurnJob job = {};
  job.panels = panels;
  job.M = M;
  job.K = shrink.job.K;
  job.w = shrink.job.a;
  job.w_stride = shrink.job.a_stride;
  job.w_dtype = job.b_dtype = shrink.job.a_dtype;
  job.y = wanted ? static_cast<void*>(shrink.job.out)
                 : thread_scratch(kOwnHSlot, M * shrink.job.out_stride * 4);
  job.y_stride = shrink.job.out_stride;
  job.y_dtype = DType::f32;
  LK_RUN(turn_kernel, true, job, 0, shrink.R);
  return static_cast<const float*>(job.y);
}

struct Scratch {
  void* data = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(data); }
};

}  // namespace

void* thread_scratch(int slot, int64_t bytes) {
  thread_local Scratch scratch[7];
  Scratch& s = scratch[slot];
  if (s.size < bytes || s.data == nullptr) {
    std::free(s.data);
    s.size = 0;
    const int64_t size = blocks(bytes + 1, 4096) * 4096;
    s.data = std::aligned_alloc(64, static_cast<size_t>(size));
    if (s.data == nullptr) throw std::bad_alloc();
    s.size = size;
  }
  return s.data;
}

bool takes_a_by_rows(const DotTask& task) { return task.by_rows && on_tiles(task.job); }

void run_dots(const DotTask* tasks, int64_t count, const GradTask* grads, int64_t num_grads) {
  static const auto kernel = LK_SELECT_ISA(dot_kernel);
  const auto units_of = [](const DotTask& t) {
    return t.by_rows ? 0 : blocks(t.M, kDotRows) * blocks(t.R, kDotCols);
  };
  int64_t units = 0, cost = 0;
  for (int64_t t = 0; t < count; t++) {
    units += units_of(tasks[t]);
    cost += cost_of(tasks[t]);
  }
  for (int64_t t = 0; t < num_grads; t++) cost += cost_of(grads[t]);
  for_parts(cost, [&](int64_t i, int64_t parts) {
    for (int64_t t = 0; t < num_grads; t++) grad_part(grads[t], i, parts);
    const int64_t begin = units * i / parts, end = units * (i + 1) / parts;
    int64_t first = 0;
    for (int64_t t = 0; t < count; t++) {
      const DotTask& task = tasks[t];
      if (task.by_rows) shrink_rows(task, nullptr, part(task.M, unit(task.job), i, parts));
      const int64_t cols = blocks(task.R, kDotCols), all = units_of(task);
      const int64_t u1 = least(all, end - first);
      for (int64_t u = begin > first ? begin - first : 0; u < u1;) {
        // The rest of this block of rows, as one call.
        const int64_t row = u / cols, stop = least(u1, (row + 1) * cols);
        kernel(task.job, row * kDotRows, least(task.M, (row + 1) * kDotRows), u % cols * kDotCols,
               least(task.R, (stop - row * cols) * kDotCols));
        u = stop;
      }
      first += all;
    }
  });
}

void run_dots_with_dropout(const DotTask& task, const Draw& draw) {
  for_parts(cost_of(task) + task.M * lanes(task.job.K) * 24, [&](int64_t i, int64_t parts) {
    shrink_rows(task, &draw, part(task.M, task.by_rows ? unit(task.job) : 2, i, parts));
  });
}

void run_update(const DotTask& shrink, const Draw* draw, const AddTask* adds, int64_t count) {
  if (!shrink.by_rows && shrink.M < kManyRows) {
    draw == nullptr ? run_dots(&shrink, 1) : run_dots_with_dropout(shrink, *draw);
    run_adds(adds, count);
    return;
  }
  int64_t cost = cost_of(shrink);
  for (int64_t t = 0; t < count; t++) cost += cost_of(adds[t]);
  for_parts(cost, [&](int64_t i, int64_t parts) {
    const Range m = part(shrink.M, unit(shrink.job), i, parts);
    shrink_rows(shrink, draw, m);
    for (int64_t t = 0; t < count && m.begin < m.end; t++) {
      const AddJob& add = adds[t].job;
      if (adds[t].N > 0) LK_RUN(add_kernel, on_tiles(add), add, m.begin, m.end, 0, adds[t].N);
    }
  });
}

void run_base(const BaseJob& job, int64_t M, const int64_t* starts, int64_t slices) {
  static const auto kernel = LK_SELECT_ISA(base_kernel);
  const int64_t N = starts[slices];
  const int64_t cost = M * N * (lanes(job.K) + 2);
  if (cost == 0) return;
  for_parts(cost, [&](int64_t i, int64_t parts) {
    int64_t by_col = least(parts, blocks(N, kBaseCols));
    while (parts % by_col != 0) by_col--;
    const int64_t by_row = parts / by_col;
    const Range m = part(M, 8, i / by_col, by_row);
    const Range n = part(N, kBaseCols, i % by_col, by_col);
    for (int64_t s = 0; s < slices; s++) {
      const int64_t n0 = n.begin > starts[s] ? n.begin : starts[s];
      const int64_t n1 = least(n.end, starts[s + 1]);
      if (n0 >= n1) continue;
      BaseJob slice = job;
      if (slice.updates != nullptr) slice.updates += s * M;
      kernel(slice, m.begin, m.end, n0, n1);
    }
  });
}

bool turn_adds(DType w, DType b) {
  static const bool pairs = isa() >= Isa::avx512bf16;
  return !pairs || w != DType::bf16 || b == w;
}

void run_turn(const TurnTask& task, const DotTask* shrink, const Draw* draw) {
  TurnJob job = task.job;
  const bool tiled = on_tiles(job);
  int64_t cost = lanes(job.M) * task.N * (job.K + job.R);
  if (tiled && turns_by_rows(task)) {
    if (shrink != nullptr) cost += cost_of(*shrink);
    for_parts(cost, [&](int64_t i, int64_t parts) {
      const Range m = part(task.job.M, kTileRows, i, parts);
      if (m.begin >= m.end) return;
      if (shrink != nullptr) shrink_rows(*shrink, draw, m);
      TurnJob rows = task.job;
      rows.M = m.end - m.begin;
      rows.y = element(rows.y, m.begin * rows.y_stride, rows.y_dtype);
      rows.panels = pack_all(task.x, m, kXSlot);
      rows.h = pack_all(task.h, m, kHSlot);
      if (rows.updates != nullptr) rows.updates += m.begin;
      LK_RUN(turn_kernel, tiled, rows, 0, task.N);
    });
    return;
  }
  if (turns_at_once(task, shrink, draw)) {
    for_parts(cost, [&](int64_t i, int64_t parts) {
      const Range n = part(task.N, kTileRows, i, parts);
      if (n.begin >= n.end) return;
      TurnJob own = task.job;
      own.panels = pack_all(task.x, {0, own.M}, kXSlot);
      PackJob h = task.h;
      if (shrink != nullptr) h.x = turn_shrink(*shrink, own.panels, own.M, n.begin == 0);
      own.h = pack_all(h, {0, own.M}, kHSlot);
      LK_RUN(turn_kernel, tiled, own, n.begin, n.end);
    });
    return;
  }
  if (draw != nullptr) {
    run_dots_with_dropout(*shrink, *draw);
  } else if (shrink != nullptr) {
    run_dots(shrink, 1);
  }
  PackJob x = task.x, h = task.h;
  job.panels = x.panels = panels_for(x, kXSlot);
  job.h = h.panels = panels_for(h, kHSlot);
  for_parts(lanes(job.K) * job.M * 4, [&](int64_t i, int64_t parts) {
    const Range k = part(x.K, kPackCols, i, parts), r = part(h.K, kPackCols, i, parts);
    if (k.begin < k.end) LK_RUN(pack_kernel, tiled, x, k.begin, k.end);
    if (r.begin < r.end) LK_RUN(pack_kernel, tiled, h, r.begin, r.end);
  });
  for_parts(cost, [&](int64_t i, int64_t parts) {
    const Range n = part(task.N, tiled ? kTileRows : kTurnCols, i, parts);
    if (n.begin < n.end) LK_RUN(turn_kernel, tiled, job, n.begin, n.end);
  });
}

void run_adds(const AddTask* tasks, int64_t count) { run_adds_and_grads(tasks, count, nullptr, 0); }

void run_adds_and_grads(const AddTask* adds, int64_t num_adds, const GradTask* grads,
                        int64_t num_grads) {
  int64_t cost = 0;
  for (int64_t t = 0; t < num_adds; t++) cost += cost_of(adds[t]);
  for (int64_t t = 0; t < num_grads; t++) cost += cost_of(grads[t]);
  if (cost <= 0 && num_adds + num_grads == 0) return;
  for_parts(cost, [&](int64_t i, int64_t parts) {
    for (int64_t t = 0; t < num_adds; t++) add_part(adds[t], i, parts);
    for (int64_t t = 0; t < num_grads; t++) grad_part(grads[t], i, parts);
  });
}

void run_transpose(void* out, int64_t out_stride, const void* b, int64_t b_stride, DType dtype,
                   int64_t N, int64_t R) {
  static const auto kernel = LK_SELECT_ISA(transpose_kernel);
  for_parts(R * lanes(N) * 4, [&](int64_t i, int64_t parts) {
    const Range n = part(N, 16, i, parts);
    if (n.begin < n.end && R > 0) kernel(out, out_stride, b, b_stride, dtype, R, n.begin, n.end);
  });
}

}  // namespace lora_kernels
