// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv_weight.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/result_memory.h"

namespace fastresnet::cpu {
namespace {

// What new tensors of the weight's sizes have the weight's strides in, those of dimensions of size
// 1 included.
MemoryFormat format_of(const Tensor& weight) {
  const int64_t channels = weight.size(1), row = channels * weight.size(3);
  const bool has_strides =
      weight.stride(1) == 1 && weight.stride(3) == channels && weight.stride(2) == row;
  const bool nhwc = is_channels_last(weight) && (has_strides || !weight.is_contiguous());
  return nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Strides of [out_channels, channels / groups, rows, columns] of the plan's products. In
// channels_last a filter's values lie in the order of a patch's.
std::array<int64_t, 4> strides(const Tensor& weight, const ConvPlan& plan) {
  if (plan.patches) return {plan.shape.channels, 1, 0, 0};
  return {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
}

}  // namespace

int64_t padded_size(const ConvPlan& plan) {
  const ConvShape& s = plan.shape;
  return channel_blocks(s.out_channels) * met_by_output(s, 0).count * pair_size(plan) *
         plan.products();
}

WeightPacking::WeightPacking(const Tensor& weight, const ConvPlan& plan, DType dtype,
                             bool transposed)
    : plan_(plan),
      dtype_(dtype),
      transposed_(transposed),
      tensor_(plan.patches ? torch::stable::contiguous(weight, MemoryFormat::ChannelsLast)
                           : weight),
      weight_{tensor_.const_data_ptr(), dtype_of("conv", weight), strides(weight, plan)},
      packed_(nullptr),
      blocks_(channel_blocks(transposed ? plan.shape.channels : plan.shape.out_channels)),
      block_floats_(kernels().conv_packed_floats(plan, dtype, transposed)) {}

WeightPacking::WeightPacking(const float* packed, const ConvPlan& plan, DType dtype)
    : plan_(plan),
      dtype_(dtype),
      transposed_(false),
      weight_{},
      packed_(packed),
      blocks_(channel_blocks(plan.shape.out_channels)),
      block_floats_(kernels().conv_packed_floats(plan, dtype, false)) {}

void WeightPacking::pack(int64_t block, float* packed) const {
  kernels().conv_pack(weight_, plan_, dtype_, transposed_, block, packed);
}

void WeightPacking::pack_all(float* packed) const {
  torch::stable::parallel_for(0, blocks_, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) pack(i, packed + i * block_floats_);
  });
}

WeightGradient::WeightGradient(const Tensor& weight, const ConvPlan& plan)
    : plan_(plan),
      format_(format_of(weight)),
      tensor_(new_result(weight.sizes(), weight.scalar_type(),
                         plan.patches ? MemoryFormat::ChannelsLast : format_)),
      dtype_(dtype_of("conv", weight)),
      data_(tensor_.mutable_data_ptr()),
      strides_(strides(tensor_, plan)) {}

Tensor WeightGradient::tensor() const { return torch::stable::contiguous(tensor_, format_); }

void WeightGradient::store(int64_t out_block, int64_t met, const float* gradients, int64_t pair,
                           int64_t pairs, int64_t count, int64_t stride) {
  const int64_t in_block = met_by_output(plan_.shape, out_block).first + met;
  const int64_t n0 = out_block * kChannelBlock, c0 = in_block * kChannelBlock;
  float taps[9 * kPairSize];
  const float* tiles = taps;
  if (plan_.tile > 1) {
    kernels().conv_weight_taps(plan_.tile, gradients + pair * kPairSize, pairs * kPairSize, count,
                               stride, taps);
    count = 1;
  } else {
    tiles = gradients + pair * plan_.products() * pair_size(plan_);
  }
  switch (dtype_) {
    case DType::bfloat16:
      return store_as<c10::BFloat16>(n0, c0, tiles, count, stride);
    case DType::float16:
      return store_as<c10::Half>(n0, c0, tiles, count, stride);
    default:
      return store_as<float>(n0, c0, tiles, count, stride);
  }
}

template <class W>
void WeightGradient::store_as(int64_t n0, int64_t c0, const float* tiles, int64_t count,
                              int64_t stride) {
  if (plan_.narrow_groups) return store_groups_as<W>(n0, tiles, count, stride);
  const ConvShape& s = plan_.shape;
  const int64_t rows = std::min(kChannelBlock, s.out_channels - n0);
  const int64_t width = s.group_width();
  float total[kChannelBlock];
  for (int64_t n = 0; n < rows; ++n) {
    // The columns that belong to the row's group.
    const int64_t group = (n0 + n) / (s.out_channels / s.groups) * width;
    const int64_t begin = std::max<int64_t>(0, group - c0);
    const int64_t end = std::min(kChannelBlock, group + width - c0);
    W* of_row = static_cast<W*>(data_) + (n0 + n) * strides_[0] + (c0 - group) * strides_[1];
    for (size_t t = 0; t < plan_.taps.size(); ++t) {
      const float* row = tiles + t * kPairSize + n * kChannelBlock;
      if (count > 1) {
        for (int64_t c = 0; c < kChannelBlock; ++c) total[c] = row[c] + row[stride + c];
        for (int64_t i = 2; i < count; ++i)
          for (int64_t c = 0; c < kChannelBlock; ++c) total[c] += row[i * stride + c];
        row = total;
      }
      W* to = of_row + tap_offset(plan_.taps[t].weight);
      if (strides_[1] == 1)
        for (int64_t c = begin; c < end; ++c) to[c] = static_cast<W>(row[c]);
      else
        for (int64_t c = begin; c < end; ++c) to[c * strides_[1]] = static_cast<W>(row[c]);
    }
  }
}

// [input channel of the group][output channel] of each tap.
template <class W>
void WeightGradient::store_groups_as(int64_t n0, const float* tiles, int64_t count,
                                     int64_t stride) {
  const ConvShape& s = plan_.shape;
  const int64_t rows = std::min(kChannelBlock, s.out_channels - n0);
  const int64_t width = s.group_width();
  for (size_t t = 0; t < plan_.taps.size(); ++t) {
    const float* tile = tiles + t * pair_size(plan_);
    W* of_tap = static_cast<W*>(data_) + n0 * strides_[0] + tap_offset(plan_.taps[t].weight);
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t c = 0; c < width; ++c) {
        const float* value = tile + c * kChannelBlock + n;
        float total = *value;
        for (int64_t i = 1; i < count; ++i) total += value[i * stride];
        of_tap[n * strides_[0] + c * strides_[1]] = static_cast<W>(total);
      }
  }
}

}  // namespace fastresnet::cpu
