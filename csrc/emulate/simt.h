// Runs CUDA kernels on the host, for tests: the kernels' own source, unchanged, a block at a time.
//
// A thread of a block is a fiber that runs until it waits, for a barrier or for the other lanes of
// its warp in a warp-wide instruction; so one warp runs as far ahead of another as the barriers
// allow, in an order that `seed` shuffles. Shared memory starts as NaN.
// cp.async lands at the last moment allowed, in the wait, or (`early`) at once: a kernel that is
// right is right under both; async.h has what sm_90 runs beside the threads. Shared memory that
// goes through the functions of device.h is watched in pieces of 16 bytes: what one thread wrote
// may not be read or written by another before a barrier, and what one thread read may not be
// written by another. A fault ends the launch with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "async.h"

namespace lora_kernels_emulate {

struct Dim3 {
  unsigned x, y, z;
};

// What a launch is run with, and what became of it.
struct Settings {
  unsigned seed = 1;
  bool early = false;
  unsigned blocks = 0;     // shuffles the blocks too; 0: in their order
  int capability = 80;     // of the device
  bool capturing = false;  // a graph: the host can not wait
};
inline Settings settings;
inline std::string fault;

struct Warp {
  unsigned generation = 0, arrived = 0;
  uint32_t in[32][16], out[32][8];
};

struct AsyncCopy {
  uint8_t* to;
  uint8_t data[16];
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started = false, done = false;
  Dim3 thread = {0, 0, 0};
  const unsigned* waits_on = nullptr;
  unsigned waits_for = 0;
  std::vector<AsyncCopy> open;                 // not yet in a group
  std::vector<std::vector<AsyncCopy>> groups;  // committed, oldest first
  Products products;
};

struct Piece {
  int64_t written = -1, read = -1;  // epoch of the last access
  unsigned writer = 0, reader = 0;  // and the thread; ~0u: several
  int pending = 0;                  // copies that are under way
};

constexpr size_t kStack = 128 * 1024;

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  std::map<uintptr_t, Piece> pieces;
  Async async;
  unsigned generation = 0, arrived = 0, live = 0;
  Dim3 index = {0, 0, 0}, grid = {1, 1, 1}, size = {1, 1, 1};
  std::function<void()> body;
  jmp_buf scheduler;
  unsigned current = 0;
};
inline Block* block = nullptr;
inline std::vector<std::vector<uint8_t>> stacks;

inline Fiber& self() { return block->fibers[block->current]; }

__attribute__((noinline, noreturn)) inline void back_to_scheduler() {
  _longjmp(block->scheduler, 1);
}

__attribute__((noinline)) inline void yield() {
  if (_setjmp(self().at) == 0) back_to_scheduler();
}

[[noreturn]] inline void fail(const std::string& what) {
  const Dim3& at = block->index;
  if (fault.empty()) {
    fault = what + " (block " + std::to_string(at.x) + "," + std::to_string(at.y) + "," +
            std::to_string(at.z) + ", thread " + std::to_string(block->current) + ")";
  }
  self().done = true;
  back_to_scheduler();
}

inline void wait_for(const unsigned* counter, unsigned seen) {
  self().waits_on = counter;
  self().waits_for = seen;
  while (*counter == seen) yield();
  self().waits_on = nullptr;
}

inline void release_block() {
  block->arrived = 0;
  ++block->generation;
}

inline void sync_threads() {
  const unsigned seen = block->generation;
  if (++block->arrived == block->live) {
    release_block();
  } else {
    wait_for(&block->generation, seen);
  }
}

// Every lane leaves `count` words in warp.in; the last to come runs `work`; returns the lane's
// warp.out.
template <class Work>
const uint32_t* collective(const uint32_t* words, int count, const Work& work) {
  const unsigned lane = block->current % 32;
  Warp& warp = block->warps[block->current / 32];
  std::memcpy(warp.in[lane], words, sizeof(uint32_t) * static_cast<size_t>(count));
  const unsigned seen = warp.generation;
  if (++warp.arrived == 32) {
    work(warp);
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait_for(&warp.generation, seen);
  }
  return warp.out[lane];
}

// ---- shared memory ----

inline uint8_t* dynamic_shared() { return block->shared.data(); }

inline Piece& piece(const void* p) {
  const uint8_t* at = static_cast<const uint8_t*>(p);
  const uint8_t* begin = block->shared.data();
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) fail("shared memory: not aligned to 16 bytes");
  if (at < begin || at + 16 > begin + block->shared.size()) fail("shared memory: out of bounds");
  return block->pieces[reinterpret_cast<uintptr_t>(at)];
}

inline void reads(const void* p) {
  Piece& at = piece(p);
  if (at.pending > 0) fail("race: read while a copy to it is under way");
  if (at.written == block->generation && at.writer != block->current) {
    fail("race: read what thread " + std::to_string(at.writer) + " wrote, with no barrier between");
  }
  at.reader = at.read == block->generation && at.reader != block->current ? ~0u : block->current;
  at.read = block->generation;
}

inline void may_write(const void* p) {
  const Piece& at = piece(p);
  if (at.pending > 0) fail("race: written while a copy to it is under way");
  if (at.read == block->generation && at.reader != block->current) {
    fail("race: written after another thread's read, with no barrier between");
  }
  if (at.written == block->generation && at.writer != block->current) {
    fail("race: written after another thread's write, with no barrier between");
  }
}

inline void has_written(const void* p) {
  Piece& at = piece(p);
  at.written = block->generation;
  at.writer = block->current;
}

inline void write_2(void* to, int i, uint16_t v) {
  may_write(to);
  std::memcpy(static_cast<uint8_t*>(to) + 2 * i, &v, 2);
  has_written(to);
}

inline void async_copy_16(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("cp.async: source not aligned to 16 bytes");
  if (bytes < 0 || bytes > 16) fail("cp.async: a size of " + std::to_string(bytes));
  may_write(to);
  AsyncCopy copy = {static_cast<uint8_t*>(to), {}};
  if (bytes > 0) std::memcpy(copy.data, from, static_cast<size_t>(bytes));
  if (settings.early) std::memcpy(to, copy.data, 16);
  ++piece(to).pending;
  self().open.push_back(copy);
}

inline void async_commit() {
  self().groups.push_back(self().open);
  self().open.clear();
}

inline void async_wait(size_t left) {
  std::vector<std::vector<AsyncCopy>>& groups = self().groups;
  while (groups.size() > left) {
    for (const AsyncCopy& copy : groups.front()) {
      std::memcpy(copy.to, copy.data, 16);
      --piece(copy.to).pending;
      has_written(copy.to);
    }
    groups.erase(groups.begin());
  }
}

// ---- launches ----

inline void enter() {
  block->body();
  Fiber& me = self();
  if (fault.empty() && (!me.open.empty() || !me.groups.empty())) {
    for (const auto& group : me.groups) {
      if (!group.empty()) fail("cp.async: the thread ended before its copies");
    }
    if (!me.open.empty()) fail("cp.async: never committed");
  }
  if (fault.empty() && !(me.products.open.empty() && me.products.groups.empty())) {
    fail("wgmma: the thread ended before its products");
  }
  me.done = true;
  back_to_scheduler();
}

__attribute__((noinline)) inline void resume(unsigned i) {
  Block& b = *block;
  b.current = i;
  Fiber& f = b.fibers[i];
  if (_setjmp(b.scheduler) != 0) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  setcontext(&f.start);
}

inline void run_block(const std::vector<unsigned>& order) {
  Block& b = *block;
  for (size_t left = order.size(); left > 0;) {
    bool moved = false;
    for (unsigned i : order) {
      Fiber& f = b.fibers[i];
      if (f.done || (f.waits_on != nullptr && *f.waits_on == f.waits_for)) continue;
      moved = true;
      resume(i);
      if (!fault.empty()) return;
      if (!f.done) continue;
      --left;
      if (--b.live > 0 && b.arrived == b.live) release_block();
    }
    if (!moved && !b.async.land(settings.seed)) {
      fault = "deadlock: every thread waits";
      return;
    }
  }
}

__attribute__((noinline)) inline void prepare(Fiber& f, unsigned i) {
  f.thread = {i, 0, 0};
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = stacks[i].data();
  f.start.uc_stack.ss_size = kStack;
  f.start.uc_link = nullptr;
  makecontext(&f.start, &enter, 0);
}

template <class Body>
void launch(Dim3 grid, unsigned threads, size_t shared, const Body& body) {
  fault.clear();
  if (stacks.size() < threads) stacks.resize(threads, std::vector<uint8_t>(kStack));
  std::vector<unsigned> order(threads);
  uint64_t state = settings.seed, block_state = settings.blocks;
  const auto shuffle = [](std::vector<unsigned>& list, uint64_t& from) {
    for (unsigned i = 0; i < list.size(); ++i) list[i] = i;
    for (size_t i = list.size(); from != 0 && i > 1; --i) {
      from = from * 6364136223846793005u + 1442695040888963407u;
      std::swap(list[i - 1], list[(from >> 33) % i]);
    }
  };
  std::vector<unsigned> blocks(size_t{grid.x} * grid.y * grid.z);
  shuffle(blocks, block_state);
  for (unsigned at : blocks) {
    Block b;
    block = &b;
    b.body = body;
    b.index = {at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y};
    b.grid = grid;
    b.size = {threads, 1, 1};
    b.live = threads;
    b.fibers.resize(threads);
    b.warps.resize((threads + 31) / 32);
    b.shared.resize(shared + 16);
    // vector memory is aligned to 16 bytes; all ones is a NaN in every format.
    std::memset(b.shared.data(), 0xff, b.shared.size());
    b.shared.resize(shared);
    for (unsigned i = 0; i < threads; ++i) prepare(b.fibers[i], i);
    shuffle(order, state);
    run_block(order);
    block = nullptr;
    if (!fault.empty()) return;
  }
}

}  // namespace lora_kernels_emulate
