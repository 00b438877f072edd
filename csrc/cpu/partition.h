// SPDX-License-Identifier: Apache-2.0
// How the entries share rows out among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "cpu/range.h"

namespace fastresnet::cpu {

// Rows are cut into as many parts as there are threads, fewer when a part would not be worth a
// thread's wake-up. The cut depends on nothing else, so sums are the same from run to run.
struct Partition {
  int64_t rows, parts;

  Partition(int64_t rows, int64_t values_per_row) : rows(rows) {
    constexpr int64_t kWorthAThread = 16 * 1024;
    const int64_t threads = torch::stable::get_num_threads();
    parts = std::clamp<int64_t>(rows * values_per_row / kWorthAThread, 1, std::min(rows, threads));
  }

  Range rows_of(int64_t part) const { return part_of(rows, parts, part); }

  // body(part, first row, last row), which must not throw.
  template <class Body>
  void parallel(Body body) const {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Range range = rows_of(i);
        body(i, range.begin, range.end);
      }
    });
  }
};

}  // namespace fastresnet::cpu
