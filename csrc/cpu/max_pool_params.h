// SPDX-License-Identifier: Apache-2.0
// What the entries of batch norm, ReLU and max-pool hand to their kernels. Activations are [batch,
// height, width, channels] (channels_last).
#pragma once

#include "params.h"

namespace fastresnet::cpu {

// A position in a window, counted row by row, is one byte.
constexpr int64_t kMaxPoolKernel = 15;
// The position where the ReLU lets nothing of a window through.
constexpr uint8_t kNoPosition = 255;

// Square windows; those at the border hang over.
struct PoolShape {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width;
  int64_t kernel, stride, padding;
};

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
};

}  // namespace fastresnet::cpu
