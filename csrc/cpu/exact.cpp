// Exact merge, the part that is the same on every instruction set: memory, threads, the body of a
// residual, and the way back.
//
// Body: u16 size a block | u32 hash a block | the blocks' bytes; little endian, see
// docs/residual_format.md. Sizes are checked against the body before anything is read through them.
// Blocks are written as soon as they are known to be right. When a later one is not, those that
// were written are taken back by the opposite pass, which is exact too: a merge is undone with what
// it has recorded so far, an undo is merged again.
// Every thread works with IEEE arithmetic (round to nearest, no flushing of subnormals), whatever
// state it is in; its state is restored.
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "exact_isa.h"

namespace lora_kernels {
namespace {

class IeeeArithmetic {
 public:
#if defined(__x86_64__)
  IeeeArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~IeeeArithmetic() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  IeeeArithmetic() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~IeeeArithmetic() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  IeeeArithmetic() {}
  ~IeeeArithmetic() {}
#endif
};

// Zeroed memory that may be missing.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t n) { allocate(n); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(data_); }
  void allocate(int64_t n) {
    data_ = static_cast<T*>(std::calloc(static_cast<size_t>(n) + 1, sizeof(T)));
  }
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
};

// The first fault that threads come upon, as one number: lower blocks win.
class Fault {
 public:
  void note(ExactResult r) {
    if (r.status == ExactStatus::ok) return;
    const int64_t mine = (r.block + 1) * 8 + static_cast<int64_t>(r.status);
    int64_t seen = __atomic_load_n(&code_, __ATOMIC_RELAXED);
    while ((seen == 0 || mine < seen) &&
           !__atomic_compare_exchange_n(&code_, &seen, mine, true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
    }
  }
  bool any() const { return __atomic_load_n(&code_, __ATOMIC_RELAXED) != 0; }
  ExactResult result() const {
    return {static_cast<ExactStatus>(code_ % 8), code_ == 0 ? -1 : code_ / 8 - 1};
  }

 private:
  int64_t code_ = 0;
};

struct Factors {
  Array<float> a, t;
  ExactTerm term = {};
};

ExactStatus widen(const LowRank& from, Factors* to) {
  static const auto panel = LK_SELECT_ISA(exact_panel);
  static const auto widen_a = LK_SELECT_ISA(exact_widen_a);
  static const auto widen_b = LK_SELECT_ISA(exact_widen_b);
  const int64_t rank = from.a.rows, width = panel();
  const int64_t panels = (from.a.cols + width - 1) / width, rows = from.b.rows;
  to->a.allocate(panels * width * rank);
  to->t.allocate(rows * rank);
  if (to->a.get() == nullptr || to->t.get() == nullptr) return ExactStatus::no_memory;
  Fault fault;
  const int64_t grain = 65536 / (rank * width) + 1;
  parallel_for(panels + rows, grain, [&](int64_t begin, int64_t end) {
    const IeeeArithmetic ieee;
    bool finite = true;
    for (int64_t i = begin; i < end; ++i) {
      finite &= i < panels
                    ? widen_a(from.a, i, to->a.get() + i * width * rank)
                    : widen_b(from.b, from.scale, i - panels, to->t.get() + (i - panels) * rank);
    }
    if (!finite) fault.note({ExactStatus::not_finite, -1});
  });
  to->term = {to->a.get(), to->t.get(), rank};
  return fault.any() ? ExactStatus::not_finite : ExactStatus::ok;
}

uint32_t read_u32(const uint8_t* p) {
  return p[0] | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
         static_cast<uint32_t>(p[3]) << 24;
}

int64_t block_weights(const ExactLayout& at, int64_t block) {
  const int64_t row = block / at.per_row * at.group, side = block % at.per_row;
  const int64_t rows = at.rows - row < at.group ? at.rows - row : at.group;
  return rows * (side + 1 == at.per_row ? at.cols - side * kExactBlock : kExactBlock);
}

bool parse(const ExactLayout& at, int64_t elem, const uint8_t* body, size_t size,
           ExactPiece* piece) {
  const size_t table = static_cast<size_t>(at.blocks) * 6;
  if (size < table) return false;
  size_t offset = table;
  for (int64_t i = 0; i < at.blocks; ++i) {
    const uint32_t length = body[2 * i] | static_cast<uint32_t>(body[2 * i + 1]) << 8;
    if (length > size - offset || length > block_weights(at, i) * elem) return false;
    piece[i] = {body + offset, length, read_u32(body + 2 * at.blocks + 4 * i)};
    offset += length;
  }
  return offset == size;
}

bool compose(const ExactLayout& at, const ExactPiece* piece, const ExactBody& out) {
  size_t size = static_cast<size_t>(at.blocks) * 6;
  for (int64_t i = 0; i < at.blocks; ++i) size += piece[i].size;
  uint8_t* body = out.allocate(out.context, size);
  if (body == nullptr) return false;
  uint8_t* data = body + at.blocks * 6;
  for (int64_t i = 0; i < at.blocks; ++i) {
    for (int b = 0; b < 2; ++b) body[2 * i + b] = static_cast<uint8_t>(piece[i].size >> (8 * b));
    uint8_t* sum = body + 2 * at.blocks + 4 * i;
    for (int b = 0; b < 4; ++b) sum[b] = static_cast<uint8_t>(piece[i].sum >> (8 * b));
    if (piece[i].size > 0) std::memcpy(data, piece[i].data, piece[i].size);
    data += piece[i].size;
  }
  return true;
}

ExactResult run(const ExactJob& job) {
  static const auto unit = LK_SELECT_ISA(exact_unit);
  Fault fault;
  const int64_t grain = 32768 / (job.layout.unit_rows * job.layout.cols) + 1;
  parallel_for(job.layout.units, grain, [&](int64_t begin, int64_t end) {
    const IeeeArithmetic ieee;
    for (int64_t i = begin; i < end && !fault.any(); ++i) {
      try {
        fault.note(unit(job, i));
      } catch (const std::bad_alloc&) {
        fault.note({ExactStatus::no_memory, -1});
      }
    }
  });
  return fault.result();
}

// Takes back the blocks that `job` has written.
void roll_back(const ExactJob& job) {
  static const auto unit = LK_SELECT_ISA(exact_unit);
  ExactJob back = job;
  back.undo = job.apply;
  back.undo_piece = job.apply_piece;
  back.apply = job.undo;
  back.apply_piece = nullptr;
  back.only_done = true;
  const IeeeArithmetic ieee;
  for (int64_t i = 0; i < job.layout.units; ++i) unit(back, i);
}

}  // namespace

ExactResult exact_pass(const Matrix& w, const LowRank* undo, const uint8_t* body, size_t body_size,
                       const LowRank* apply, const ExactBody* out) {
  const ExactLayout at = exact_layout(w.rows, w.cols);
  if (at.blocks == 0) return {body_size == 0 ? ExactStatus::ok : ExactStatus::malformed, -1};
  Factors undo_factors, apply_factors;
  Array<ExactPiece> old_piece(undo != nullptr ? at.blocks : 0);
  Array<ExactPiece> new_piece(apply != nullptr ? at.blocks : 0);
  Array<uint8_t*> chunk(at.units);
  Array<uint8_t> done(at.blocks);
  if (old_piece.get() == nullptr || new_piece.get() == nullptr || chunk.get() == nullptr ||
      done.get() == nullptr) {
    return {ExactStatus::no_memory, -1};
  }
  if (undo != nullptr) {
    if (!parse(at, dtype_size(w.dtype), body, body_size, old_piece.get())) {
      return {ExactStatus::malformed, -1};
    }
    const ExactStatus status = widen(*undo, &undo_factors);
    if (status != ExactStatus::ok) return {status, -1};
  }
  if (apply != nullptr) {
    const ExactStatus status = widen(*apply, &apply_factors);
    if (status != ExactStatus::ok) return {status, -1};
  }
  const ExactJob job = {w,
                        at,
                        undo != nullptr ? &undo_factors.term : nullptr,
                        old_piece.get(),
                        apply != nullptr ? &apply_factors.term : nullptr,
                        apply != nullptr ? new_piece.get() : nullptr,
                        chunk.get(),
                        done.get(),
                        false};
  ExactResult result = run(job);
  if (result.status == ExactStatus::ok && apply != nullptr && !compose(at, new_piece.get(), *out)) {
    result = {ExactStatus::no_memory, -1};
  }
  if (result.status != ExactStatus::ok) roll_back(job);
  for (int64_t i = 0; i < at.units; ++i) std::free(chunk.get()[i]);
  return result;
}

}  // namespace lora_kernels
