// SPDX-License-Identifier: Apache-2.0
#include "cuda/conv_graphs.h"

#include <stdexcept>
#include <string>

namespace fastresnet::cuda {
namespace {

using cudnn::DataType;
using cudnn::Pointwise;
using cudnn::Sizes;
using TensorId = cudnn::Graph::TensorId;

DataType data_type(DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
      return DataType::bfloat16;
    case DType::float16:
      return DataType::float16;
    case DType::float32:
      return DataType::float32;
  }
  throw std::invalid_argument("unknown dtype");
}

// The graph of one problem. Tensors with memory are made in the order that ConvGraph names.
class Builder {
 public:
  explicit Builder(const ConvProblem& p)
      : p_(p),
        type_(data_type(p.dtype)),
        x_{p.batch, p.channels, p.height, p.width},
        y_{p.batch, p.out_channels, p.out_height(), p.out_width()},
        weight_{p.out_channels, p.channels / p.groups, p.kernel_height, p.kernel_width} {}

  cudnn::Graph build() {
    if (is_forward(p_.graph))
      conv_sums();
    else
      dgrad();
    return std::move(graph_);
  }

 private:
  void conv_sums() {
    const TensorId x = graph_.tensor(x_, type_), weight = graph_.tensor(weight_, type_);
    const TensorId y = graph_.tensor(y_, type_);
    graph_.convolution(x, weight, y, geometry());
    graph_.sum(y, graph_.vector(y_));
    const TensorId square = graph_.between(y_);
    graph_.pointwise(Pointwise::mul, y, y, square);
    graph_.sum(square, graph_.vector(y_));
  }

  void dgrad() {
    const TensorId dy = graph_.tensor(y_, type_), weight = graph_.tensor(weight_, type_);
    const TensorId product = graph_.between(x_);
    graph_.convolution_backward_data(dy, weight, product, geometry());
    switch (p_.graph) {
      case ConvGraph::conv_dgrad_add: {
        const TensorId addend = graph_.tensor(x_, type_);
        graph_.pointwise(Pointwise::add, product, addend, graph_.tensor(x_, type_));
        return;
      }
      case ConvGraph::bn_relu_conv_dgrad:
        return behind_relu(product);
      default:
        return behind_join(product);
    }
  }

  void behind_relu(TensorId product) {
    const TensorId centred = difference();
    const TensorId scaled = graph_.between(x_), z = graph_.between(x_);
    graph_.pointwise(Pointwise::mul, centred, graph_.vector(x_), scaled);
    graph_.pointwise(Pointwise::add, scaled, graph_.vector(x_), z);
    const TensorId dz = graph_.tensor(x_, type_);
    graph_.relu_backward(product, z, dz);
    graph_.sum(dz, graph_.vector(x_));
    sum_of_products(dz, centred);
  }

  void behind_join(TensorId product) {
    const TensorId addend = graph_.tensor(x_, type_), mask = graph_.tensor(x_, DataType::bit);
    const TensorId whole = graph_.between(x_);
    graph_.pointwise(Pointwise::add, product, addend, whole);
    const TensorId centred = difference();
    const bool dual = p_.graph == ConvGraph::bn_add_bn_relu_conv_dgrad;
    const TensorId residual = dual ? difference() : centred;
    const TensorId dz = graph_.tensor(x_, type_);
    graph_.pointwise(Pointwise::mul, whole, mask, dz);
    graph_.sum(dz, graph_.vector(x_));
    sum_of_products(dz, centred);
    if (dual) sum_of_products(dz, residual);
  }

  // A tensor like x without a mean that comes next to it in memory.
  TensorId difference() {
    const TensorId x = graph_.tensor(x_, type_), centred = graph_.between(x_);
    graph_.pointwise(Pointwise::sub, x, graph_.vector(x_), centred);
    return centred;
  }

  void sum_of_products(TensorId a, TensorId b) {
    const TensorId product = graph_.between(x_);
    graph_.pointwise(Pointwise::mul, a, b, product);
    graph_.sum(product, graph_.vector(x_));
  }

  cudnn::Geometry geometry() const { return {p_.stride, p_.padding, p_.dilation}; }

  const ConvProblem& p_;
  DataType type_;
  Sizes x_, y_, weight_;
  cudnn::Graph graph_;
};

}  // namespace

std::unique_ptr<cudnn::Plan> make_plan(const ConvProblem& problem, const cudnn::Target& target) {
  // Of a mask's bytes, and of sums side by side at addresses of whole 16 bytes.
  const int64_t channels = is_forward(problem.graph) ? problem.out_channels : problem.channels;
  if (channels % 8 != 0)
    throw std::runtime_error("no plan for channels that do not come in eights: " +
                             std::to_string(channels));
  return Builder(problem).build().plan(target);
}

}  // namespace fastresnet::cuda
