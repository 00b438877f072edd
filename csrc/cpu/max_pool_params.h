// SPDX-License-Identifier: Apache-2.0
// What the entries of batch norm, ReLU and max-pool hand to their kernels. Activations are [batch,
// height, width, channels] (channels_last).
#pragma once

#include "params.h"

namespace fastresnet::cpu {

struct MaxPoolForwardParams {
  PoolShape shape;
  DType dtype;
  const void* x;       // [batch, height, width, channels]
  const float* scale;  // [channels]
  const float* shift;  // [channels]
  void* out;           // [batch, out_height, out_width, channels]
  uint8_t* index;      // like out, positions
};

struct MaxPoolBackwardParams {
  PoolShape shape;
  DType dtype;
  const void* grad;      // like out
  const uint8_t* index;  // as the forward leaves it
  const void* x;
  const float* mean;  // [channels]
  void* dx;
  bool past_caches;  // dx is too large to be found in a cache by whoever reads it next
};

}  // namespace fastresnet::cpu
