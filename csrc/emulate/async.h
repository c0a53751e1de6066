// What runs beside the threads of a block on sm_90, for simt.h: barriers that count bytes, copies
// that have not landed, products that have not been computed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

namespace lora_kernels_emulate {

// An mbarrier (PTX ISA 9.7.13.15): a phase ends when every arrival and every byte has come.
struct Mbarrier {
  unsigned phase = 0;
  int expected = 0, pending = 0;
  int64_t bytes = 0;

  void settle() {
    if (pending != 0 || bytes != 0) return;
    ++phase;
    pending = expected;
  }
};

inline int sm90_launches = 0;  // since the library was loaded

struct Meeting {
  unsigned generation = 0;
  int arrived = 0;
};

struct Async {
  std::map<const void*, Mbarrier> barriers;
  std::map<int, Meeting> meetings;
  std::vector<std::function<void()>> landing;  // copies under way
  std::map<uintptr_t, unsigned> unfenced;      // pieces of 16 bytes that a thread stored

  // Lets one copy land; false when none is under way.
  bool land(uint64_t seed) {
    if (landing.empty()) return false;
    const auto one = landing.begin() + static_cast<std::ptrdiff_t>(seed % landing.size());
    const std::function<void()> run = *one;
    landing.erase(one);
    run();
    return true;
  }
};

// Products of a thread: not yet in a group, and groups, oldest first.
struct Products {
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> groups;
};

}  // namespace lora_kernels_emulate
