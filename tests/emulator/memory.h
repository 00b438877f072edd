// SPDX-License-Identifier: Apache-2.0
// Global memory as the emulated device sees it: which ranges the test declared, and what a launch
// moves to and from them. Addresses are host addresses; nothing is copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

enum class Access { read_only_load, load, store };

// What kernels move, in the three measures that matter on a device.
struct Traffic {
  struct Count {
    int64_t bytes = 0;         // that threads asked for
    int64_t transactions = 0;  // sectors that warps asked for, counted once a warp and instruction
    int64_t sectors = 0;       // different ones a launch: what an endless cache would pass on
  };
  Count loaded, stored;
};

constexpr uintptr_t kSectorBytes = 32;  // a device's smallest transfer

// One thread's access. Lanes of a warp that come to one place in the source for the same time make
// one request, as they would on a device.
struct Request {
  uint64_t instruction;  // place, how often its thread had been there, warp
  uintptr_t sector;
  Access kind;
};

class GlobalMemory {
 public:
  void forget();
  void declare(const void* address, int64_t bytes);
  void begin_launch();
  // Counts an access; what is wrong with it, if anything.
  const char* access(uintptr_t begin, size_t bytes, Access kind);
  bool holds(uintptr_t begin, size_t bytes) const;
  // Counts the transactions of one block and empties the list.
  void finish_block(std::vector<Request>& requests);
  const Traffic& traffic() const { return traffic_; }

 private:
  struct Range {
    uintptr_t begin, end;
    std::vector<uint8_t> seen;     // a sector each: loaded, stored by this launch
    std::vector<uint8_t> written;  // a byte each, by this launch
  };
  std::vector<Range> ranges_;
  Traffic traffic_;
};

}  // namespace emulator
