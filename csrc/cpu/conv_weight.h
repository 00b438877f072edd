// SPDX-License-Identifier: Apache-2.0
// A convolution's weight in the order in which the kernels read it, and its gradient back in the
// weight's own layout.
#pragma once

#include <array>

#include "check.h"
#include "cpu/conv_params.h"

namespace fastresnet::cpu {

// Channels with the zeros that fill the last block.
constexpr int64_t padded(int64_t channels) { return channel_blocks(channels) * kChannelBlock; }

// Elements of all products' matrices of weights in whole blocks: channels filled in, and, where
// groups are not multiplied as narrow ones, zeros for pairs of channels of one block that share no
// group.
int64_t padded_size(const ConvPlan& plan);

// How a weight is packed: in blocks of output channels, or (transposed) of input channels.
class WeightPacking {
 public:
  WeightPacking(const Tensor& weight, const ConvPlan& plan, DType dtype, bool transposed);
  // Of a weight that pack_all() packed before, not transposed.
  WeightPacking(const float* packed, const ConvPlan& plan, DType dtype);

  int64_t block_floats() const { return block_floats_; }
  void pack(int64_t block, float* packed) const;
  int64_t floats() const { return blocks_ * block_floats_; }
  // Every block, one after another, by all threads.
  void pack_all(float* packed) const;
  // Every block, where it was packed before; else null.
  const float* packed() const { return packed_; }

 private:
  const ConvPlan& plan_;
  DType dtype_;
  bool transposed_;
  Tensor tensor_;
  ConvWeight weight_;  // of tensor_
  const float* packed_;
  int64_t blocks_, block_floats_;
};

// The gradient of `weight`, filled block by block.
class WeightGradient {
 public:
  WeightGradient(const Tensor& weight, const ConvPlan& plan);

  // One block of output channels and the `met`th block of input channels that it meets, from what
  // conv_weight_gradient left of `pairs` such pairs, this one being the `pair`th: the sum of
  // `count` gradients, which are `stride` floats apart, in their order.
  void store(int64_t out_block, int64_t met, const float* gradients, int64_t pair, int64_t pairs,
             int64_t count, int64_t stride);

  Tensor tensor() const;

 private:
  template <class W>
  void store_as(int64_t n0, int64_t c0, const float* tiles, int64_t count, int64_t stride);
  template <class W>
  void store_groups_as(int64_t n0, const float* tiles, int64_t count, int64_t stride);
  int64_t tap_offset(int64_t weight) const {
    const int64_t width = plan_.shape.kernel_width;
    return weight / width * strides_[2] + weight % width * strides_[3];
  }

  const ConvPlan& plan_;
  MemoryFormat format_;
  Tensor tensor_;
  DType dtype_;
  void* data_;
  std::array<int64_t, 4> strides_;
};

}  // namespace fastresnet::cpu
