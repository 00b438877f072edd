// SPDX-License-Identifier: Apache-2.0
// A convolution's weight in the order in which the kernels read it, and its gradient back in the
// weight's own layout.
#pragma once

#include "check.h"
#include "cpu/conv_params.h"

namespace fastresnet::cpu {

// Channels with the zeros that fill the last block.
constexpr int64_t padded(int64_t channels) { return channel_blocks(channels) * kChannelBlock; }

// Elements of the weight in whole blocks: channels filled in, and zeros for pairs of channels of
// one block that share no group.
int64_t padded_size(const ConvShape& s);

// Every block of output channels, or (transposed) of input channels, one after another; in the
// calling thread's memory until the next call.
const float* pack(const Tensor& weight, const ConvPlan& plan, DType dtype, bool transposed);

// The gradient of `weight`, filled block by block.
class WeightGradient {
 public:
  WeightGradient(const Tensor& weight, const ConvPlan& plan);

  // One block of output channels and the `met`th block of input channels that it meets: the sum of
  // `count` tiles [taps, 32, 32], which are `stride` floats apart, in their order.
  void store(int64_t out_block, int64_t met, const float* tiles, int64_t count, int64_t stride);

  const Tensor& tensor() const { return tensor_; }

 private:
  template <class W>
  void store_as(int64_t n0, int64_t c0, const float* tiles, int64_t count, int64_t stride);

  const ConvPlan& plan_;
  Tensor tensor_;
  DType dtype_;
  void* data_;
  int64_t strides_[4];
};

}  // namespace fastresnet::cpu
