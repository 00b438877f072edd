// SPDX-License-Identifier: Apache-2.0
// What the convolution entries hand to their kernels. Activations are [batch, height, width,
// channels] (channels_last), those of one call all of one dtype.
#pragma once

#include <array>

#include "cpu/conv_plan.h"
#include "params.h"

namespace fastresnet::cpu {

// Convolutions work on channels in blocks of this many, zeros filled in where there are fewer.
constexpr int64_t kChannelBlock = 32;

// Values that a pair of blocks of channels has of a weight, at one tap or product: [output channel]
// [input channel].
constexpr int64_t kPairSize = kChannelBlock * kChannelBlock;

// The same of a weight's gradient, which of narrow groups is [channel of the group's input][output
// channel].
inline int64_t pair_size(const ConvPlan& plan) {
  return plan.narrow_groups ? plan.shape.group_width() * kChannelBlock : kPairSize;
}

// Of a staged line, and of a processor's cache.
constexpr int64_t kLineBytes = 64;

// Tiles whose products are computed before they are transformed back: few enough for the products
// to stay in the second-level cache, and a multiple of the rows that registers hold.
constexpr int64_t kBlockTiles = 42;

// Values of the largest patch that is staged as one pixel.
constexpr int64_t kLargestPatch = 512;

// Strides up to 4: what kernels keep of each phase has a fixed size.
constexpr int64_t kMaxStride = 4;
constexpr int64_t kMaxPhases = kMaxStride * kMaxStride;

constexpr int64_t channel_blocks(int64_t channels) {
  return (channels + kChannelBlock - 1) / kChannelBlock;
}

// The blocks of the other side's channels that a block's are computed with: all of them, or those
// that share a group with it. Groups are as wide on both sides, and divide a block or are several.
struct MetBlocks {
  int64_t first, count;
};
constexpr MetBlocks met_blocks(const ConvShape& s, int64_t other_channels, int64_t block) {
  if (s.groups == 1) return {0, channel_blocks(other_channels)};
  const int64_t count = channel_blocks(other_channels / s.groups);
  return {block / count * count, count};
}
constexpr MetBlocks met_by_output(const ConvShape& s, int64_t out_block) {
  return met_blocks(s, s.channels, out_block);
}
constexpr MetBlocks met_by_input(const ConvShape& s, int64_t in_block) {
  return met_blocks(s, s.out_channels, in_block);
}

// [out_channels, channels / groups, kernel_height, kernel_width], in any layout.
struct ConvWeight {
  const void* data;
  DType dtype;
  std::array<int64_t, 4> strides;
};

struct ConvForwardParams {
  const ConvPlan* plan;
  DType dtype;
  const void* x;
  const float* scale;  // [channels]: the input is relu(scale * x + shift); null: it is x
  const float* shift;  // [channels]
  void* y;
  bool past_caches;  // y is too large to be found in a cache by whoever reads it next
  // In training y is the convolution, and its moments are taken; in inference it is
  // relu(convolution + bias + residual), or that without the ReLU.
  bool inference;
  const float* bias;     // [out_channels]; may be null
  const void* residual;  // like y; may be null
  bool relu;
};

// Sums over outputs of what they are more than `shift`, and of its square; all [out_channels].
struct ConvMoments {
  bool first;  // nothing was added yet: shift is to be set
  float* shift;
  double *sum, *square;
};

struct ConvBackwardParams {
  const ConvPlan* plan;
  DType dtype;
  const void* grad;          // of what follows the batch norm of y
  const uint8_t* grad_mask;  // where it passes; null: everywhere
  const void* y;
  const float* mean;  // [out_channels], of y
  BnCoefficients coefficients;
  const void* x;
  const float* scale;   // as in the forward; where given, the gradient of scale * x + shift is
  const float* shift;   // taken and its sums with it
  const float* x_mean;  // [channels], with scale
  const void* addend;   // like x, added to the gradient of x; may be null
  const uint8_t* addend_mask;  // where it counts; null: everywhere
  void* dx;                    // null: not wanted
  bool past_caches;            // of dx, as in the forward
};

}  // namespace fastresnet::cpu
