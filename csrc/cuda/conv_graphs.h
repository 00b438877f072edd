// SPDX-License-Identifier: Apache-2.0
// Convolutions with what comes behind them as graphs of cuDNN: which there are, and their plans.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/cudnn_graph.h"
#include "params.h"

namespace fastresnet::cuda {

// x is the convolution's input, y its output; dy and dx are their gradients. In memory, in this
// order, with vectors of float32 [channels]:
enum class ConvGraph : int32_t {
  // x, weight, y, and the sums of y and of its squares
  conv_sums,
  // dy, weight, addend, dx = dgrad + addend
  conv_dgrad_add,
  // dy, weight, x, mean, scale, bias, dz, sums: x is what relu((x - mean) * scale + bias) is of,
  // dz the gradient in front of the ReLU; the sums are those of dz and of dz * (x - mean)
  bn_relu_conv_dgrad,
  // dy, weight, addend, mask, x, mean, dz, sums: dz = mask ? dgrad + addend : 0
  bn_add_relu_conv_dgrad,
  // dy, weight, addend, mask, x, mean, residual, residual_mean, dz, and a third sum, of
  // dz * (residual - residual_mean)
  bn_add_bn_relu_conv_dgrad,
};

constexpr bool is_forward(ConvGraph graph) { return graph == ConvGraph::conv_sums; }

struct ConvProblem {
  ConvGraph graph;
  DType dtype;
  int64_t batch, channels, height, width;  // of x
  int64_t out_channels, kernel_height, kernel_width;
  int64_t stride, padding, dilation, groups;

  int64_t out_height() const { return out_size(height, kernel_height); }
  int64_t out_width() const { return out_size(width, kernel_width); }
  auto operator<=>(const ConvProblem&) const = default;

 private:
  int64_t out_size(int64_t size, int64_t kernel) const {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  }
};

// Throws std::runtime_error where cuDNN has no plan for it.
std::unique_ptr<cudnn::Plan> make_plan(const ConvProblem& problem, const cudnn::Target& target);

}  // namespace fastresnet::cuda
