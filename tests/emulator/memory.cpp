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
  ranges_.push_back({begin, end, std::vector<uint8_t>(sectors), std::vector<uint8_t>(bytes)});
}

void GlobalMemory::begin_launch() {
  for (Range& range : ranges_) {
    std::fill(range.seen.begin(), range.seen.end(), uint8_t{0});
    std::fill(range.written.begin(), range.written.end(), uint8_t{0});
  }
}

bool GlobalMemory::holds(uintptr_t begin, size_t bytes) const {
  return std::any_of(ranges_.begin(), ranges_.end(), [&](const Range& range) {
    return begin >= range.begin && begin + bytes <= range.end;
  });
}

const char* GlobalMemory::access(uintptr_t begin, size_t bytes, Access kind) {
  if (begin % bytes != 0) return "misaligned";
  const auto found = std::find_if(ranges_.begin(), ranges_.end(), [&](const Range& range) {
    return begin >= range.begin && begin + bytes <= range.end;
  });
  if (found == ranges_.end()) return "outside of every tensor:";
  const auto written = found->written.begin() + static_cast<int64_t>(begin - found->begin);
  if (kind == Access::store) std::fill_n(written, bytes, uint8_t{1});
  // The cache that such loads go through is not told of stores.
  if (kind == Access::read_only_load && std::count(written, written + bytes, uint8_t{1}) > 0)
    return "of what the same launch has written, as read-only:";
  Traffic::Count& count = kind == Access::store ? traffic_.stored : traffic_.loaded;
  count.bytes += static_cast<int64_t>(bytes);
  uint8_t& seen = found->seen[begin / kSectorBytes - found->begin / kSectorBytes];
  const uint8_t bit = kind == Access::store ? 2 : 1;
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
    ++(requests[i].kind == Access::store ? traffic_.stored : traffic_.loaded).transactions;
  }
  requests.clear();
}

}  // namespace emulator
