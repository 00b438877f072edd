// SPDX-License-Identifier: Apache-2.0
// Memory layout: whether a tensor is dense channels_last, and new tensors that are.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace fastresnet {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Strides of dimensions of size 1 say nothing about where a value lies.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline Tensor empty_channels_last(const Tensor& like) {
  return torch::stable::empty(like.sizes(), like.scalar_type(), std::nullopt, like.device(),
                              std::nullopt, MemoryFormat::ChannelsLast);
}

inline Tensor empty_vector(const Tensor& like, int64_t size) {
  return torch::stable::empty({size}, ScalarType::Float, std::nullopt, like.device());
}

}  // namespace fastresnet
