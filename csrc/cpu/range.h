// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace fastresnet::cpu {

// Those from begin to before end.
struct Range {
  int64_t begin, end;
};

}  // namespace fastresnet::cpu
