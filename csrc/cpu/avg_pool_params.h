// SPDX-License-Identifier: Apache-2.0
// What the entries of average pooling hand to their kernels. Activations are [batch, height, width,
// channels] (channels_last), averages [batch, channels].
#pragma once

#include <cstdint>

#include "params.h"

namespace fastresnet::cpu {

struct AvgPoolParams {
  AvgPoolShape shape;
  DType dtype;
  const void* x;
  void* out;
};

struct AvgPoolBackwardParams {
  AvgPoolShape shape;
  DType dtype;
  const void* grad;  // like out
  void* dx;          // like x
};

}  // namespace fastresnet::cpu
