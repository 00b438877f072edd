// SPDX-License-Identifier: Apache-2.0
// What the vec_*-inl.h of all levels share: how many lanes of a vector hold values, and the names
// of the storage types.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace fastresnet::cpu {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

struct Full {};  // every lane
struct Part {    // the first `count` lanes, fewer than all
  int count;
};

}  // namespace fastresnet::cpu
