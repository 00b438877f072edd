// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace fastresnet::cpu {

// Those from begin to before end.
struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
  bool has(int64_t i) const { return begin <= i && i < end; }
};

// One of `parts` even parts of `count` things.
inline Range part_of(int64_t count, int64_t parts, int64_t part) {
  return {count * part / parts, count * (part + 1) / parts};
}

}  // namespace fastresnet::cpu
