// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <algorithm>
#include <tuple>

namespace emulator {

void GlobalMemory::forget() {
  ranges_.clear();
  traffic_ = {};
}

void GlobalMemory::declare(const void* address, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const uintptr_t end = begin + bytes;
  const size_t sectors = (end + kSectorBytes - 1) / kSectorBytes - begin / kSectorBytes;
  ranges_.push_back({begin, end, std::vector<uint8_t>(sectors)});
}

void GlobalMemory::begin_launch() {
  for (Range& range : ranges_) std::fill(range.seen.begin(), range.seen.end(), uint8_t{0});
}

const char* GlobalMemory::access(uintptr_t begin, size_t bytes, Access kind) {
  if (begin % bytes != 0) return "misaligned";
  const auto found = std::find_if(ranges_.begin(), ranges_.end(), [&](const Range& range) {
    return begin >= range.begin && begin + bytes <= range.end;
  });
  if (found == ranges_.end()) return "outside of every tensor:";
  Traffic::Count& count = kind == Access::load ? traffic_.loaded : traffic_.stored;
  count.bytes += static_cast<int64_t>(bytes);
  uint8_t& seen = found->seen[begin / kSectorBytes - found->begin / kSectorBytes];
  const uint8_t bit = kind == Access::load ? 1 : 2;
  if (!(seen & bit)) ++count.sectors;
  seen |= bit;
  return nullptr;
}

void GlobalMemory::finish_block(std::vector<Request>& requests) {
  const auto key = [](const Request& r) { return std::tuple(r.instruction, r.sector, r.kind); };
  std::sort(requests.begin(), requests.end(),
            [&](const Request& a, const Request& b) { return key(a) < key(b); });
  for (size_t i = 0; i < requests.size(); ++i) {
    if (i > 0 && key(requests[i]) == key(requests[i - 1])) continue;
    ++(requests[i].kind == Access::load ? traffic_.loaded : traffic_.stored).transactions;
  }
  requests.clear();
}

}  // namespace emulator
