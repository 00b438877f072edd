// SPDX-License-Identifier: Apache-2.0
// What descriptors of the stand-in for cuDNN mean: tensors, and operations between them. Each
// function checks what it reads.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

#include "descriptor.h"

namespace stand_in {

using Sizes = std::vector<int64_t>;  // of n, c, h, w

struct Tensor {
  int64_t id;
  DataType type;
  Sizes sizes, strides;  // in values
  int64_t alignment;
  bool is_virtual;

  bool operator==(const Tensor&) const = default;

  int64_t count() const {
    return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
  }
  // Of a value among the tensor's, row by row.
  int64_t index(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return ((n * sizes[1] + c) * sizes[2] + h) * sizes[3] + w;
  }
  int64_t bits() const { return type == DataType::bit ? 1 : type == DataType::float32 ? 32 : 16; }
  // From the first value to behind the last.
  int64_t bytes() const {
    int64_t last = 0;
    for (int d = 0; d < 4; ++d) last += (sizes[d] - 1) * strides[d];
    return ((last + 1) * bits() + 7) / 8;
  }
};

inline Tensor tensor_of(const Descriptor& d) {
  const Tensor t{.id = d.one<int64_t>(kTensorUniqueId),
                 .type = d.one<DataType>(kTensorDataType),
                 .sizes = d.all<int64_t>(kTensorDimensions),
                 .strides = d.all<int64_t>(kTensorStrides),
                 .alignment = d.one<int64_t>(kTensorAlignment),
                 .is_virtual = d.one<char>(kTensorIsVirtual) != 0};
  const std::set known{DataType::float32, DataType::float16, DataType::bfloat16, DataType::bit};
  check_support(known.contains(t.type), "tensor ", t.id, " of an unknown data type");
  check(t.alignment > 0 && t.alignment * 8 % t.bits() == 0, "tensor ", t.id, ": an alignment of ",
        t.alignment, " bytes");
  std::array<int, 4> inner_first{0, 1, 2, 3};
  std::sort(inner_first.begin(), inner_first.end(),
            [&](int a, int b) { return t.strides[a] < t.strides[b]; });
  int64_t inside = 1;  // how far the dimensions so far reach
  for (const int i : inner_first) {
    check(t.sizes[i] > 0 && t.strides[i] > 0, "tensor ", t.id, ": a size of ", t.sizes[i],
          " with a stride of ", t.strides[i]);
    check(t.sizes[i] == 1 || t.strides[i] >= inside, "tensor ", t.id, ": values that overlap");
    inside += (t.sizes[i] - 1) * t.strides[i];
  }
  check_support(t.type != DataType::bit || (t.sizes[1] % 8 == 0 && t.strides[1] == 1), "tensor ",
                t.id, ": bits of ", t.sizes[1], " channels");
  return t;
}

struct Convolution {
  std::vector<int64_t> dilations, strides, before, behind;
};

inline Convolution convolution_of(const Descriptor& d) {
  check_support(d.one<DataType>(kConvolutionPrecision) == DataType::float32 &&
                    d.one<int>(kConvolutionModeOf) == kCrossCorrelation &&
                    d.one<int64_t>(kConvolutionSpatialDimensions) == 2,
                "a convolution other than a cross correlation in 2 dimensions and float32");
  Convolution c{d.all<int64_t>(kConvolutionDilations), d.all<int64_t>(kConvolutionStrides),
                d.all<int64_t>(kConvolutionPrePaddings), d.all<int64_t>(kConvolutionPostPaddings)};
  for (int i = 0; i < 2; ++i)
    check(c.dilations[i] > 0 && c.strides[i] > 0 && c.before[i] >= 0 && c.behind[i] >= 0,
          "a convolution with a stride or a dilation below 1, or a padding below 0");
  return c;
}

inline void check_sizes(const Convolution& c, const Tensor& x, const Tensor& w, const Tensor& y) {
  const bool is_grouped = x.sizes[1] % w.sizes[1] == 0;
  check(is_grouped && w.sizes[0] % (x.sizes[1] / w.sizes[1]) == 0, "a filter of ", w.sizes[0],
        " x ", w.sizes[1], " for ", x.sizes[1], " channels");
  bool fits = x.sizes[0] == y.sizes[0] && y.sizes[1] == w.sizes[0];
  for (int i = 0; i < 2; ++i) {
    const int64_t room = x.sizes[2 + i] + c.before[i] + c.behind[i];
    const int64_t taps = c.dilations[i] * (w.sizes[2 + i] - 1) + 1;
    fits = fits && room >= taps && y.sizes[2 + i] == (room - taps) / c.strides[i] + 1;
  }
  check(fits, "a convolution of tensor ", x.id, " to other sizes than those of tensor ", y.id);
}

struct Operation {
  DescriptorType type;
  std::vector<Tensor> inputs;
  Tensor output;
  Convolution convolution{};
  Pointwise mode{};
};

inline Operation operation_of(const Descriptor& d) {
  const auto tensor = [&](Attribute name) { return tensor_of(d.part(name, kTensor)); };
  switch (d.type) {
    case kConvolutionForward: {
      const Tensor x = tensor(kForwardX), w = tensor(kForwardW), y = tensor(kForwardY);
      const Convolution c = convolution_of(d.part(kForwardConvolution, kConvolution));
      check_sizes(c, x, w, y);
      check_support(d.one<float>(kForwardAlpha) == 1 && d.one<float>(kForwardBeta) == 0,
                    "a convolution that is scaled, or added to what is there");
      return {d.type, {x, w}, y, c};
    }
    case kConvolutionBackwardData: {
      const Tensor dy = tensor(kBackwardDataDy), w = tensor(kBackwardDataW);
      const Tensor dx = tensor(kBackwardDataDx);
      const Convolution c = convolution_of(d.part(kBackwardDataConvolution, kConvolution));
      check_sizes(c, dx, w, dy);
      check_support(d.one<float>(kBackwardDataAlpha) == 1 && d.one<float>(kBackwardDataBeta) == 0,
                    "a gradient that is scaled, or added to what is there");
      return {d.type, {dy, w}, dx, c};
    }
    case kPointwiseOperation: {
      const Descriptor& function = d.part(kPointwiseDescriptor, kPointwise);
      const auto mode = function.one<Pointwise>(kPointwiseModeOf);
      const std::set known{Pointwise::add, Pointwise::mul, Pointwise::sub,
                           Pointwise::relu_backward};
      check_support(
          function.one<DataType>(kPointwisePrecision) == DataType::float32 && known.contains(mode),
          "an unknown pointwise function, or one in another precision than float32");
      const bool is_backward = mode == Pointwise::relu_backward;
      const Tensor x = tensor(kPointwiseX);
      const Tensor other = tensor(is_backward ? kPointwiseDy : kPointwiseB);
      const Tensor output = tensor(is_backward ? kPointwiseDx : kPointwiseY);
      check(d.parts.size() == 4, "a pointwise operation with more tensors than it has a use for");
      for (int i = 0; i < 4; ++i) {
        const int64_t a = x.sizes[i], b = other.sizes[i];
        check((a == b || (!is_backward && (a == 1 || b == 1))) && output.sizes[i] == std::max(a, b),
              "a pointwise operation on sizes of ", a, " and ", b, " to one of ", output.sizes[i]);
      }
      return {d.type, {x, other}, output, {}, mode};
    }
    case kReductionOperation: {
      const Descriptor& reduction = d.part(kReductionDescriptor, kReduction);
      check_support(reduction.one<int>(kReductionOperatorOf) == kSum &&
                        reduction.one<DataType>(kReductionPrecision) == DataType::float32,
                    "a reduction other than a sum in float32");
      const Tensor x = tensor(kReductionX), y = tensor(kReductionY);
      check((y.sizes == Sizes{1, x.sizes[1], 1, 1}), "a sum that is not one value for each of ",
            x.sizes[1], " channels");
      check_support(y.type == DataType::float32 && !y.is_virtual,
                    "a sum that is not stored in float32");
      return {d.type, {x}, y};
    }
    default:
      throw Error{kBadParameter, "a graph of something that is no operation"};
  }
}

// Bits are factors only, and a convolution's operands of one type.
inline void check_types(const Operation& o) {
  const auto is_bit = [](const Tensor& t) { return t.type == DataType::bit; };
  const bool of_bits = std::any_of(o.inputs.begin(), o.inputs.end(), is_bit);
  const bool is_product = o.type == kPointwiseOperation && o.mode == Pointwise::mul;
  check_support(!is_bit(o.output) && (!of_bits || is_product), "bits other than as a factor");
  const bool is_convolution = o.type == kConvolutionForward || o.type == kConvolutionBackwardData;
  check_support(!is_convolution || o.inputs[0].type == o.inputs[1].type,
                "a convolution of two data types");
}

// In an order in which each finds its inputs; cuDNN too takes them in any.
inline std::vector<Operation> operations_of(const Descriptor& graph) {
  std::vector<Operation> waiting, ordered;
  for (const auto& part : graph.parts.at(kGraphOperations)) {
    waiting.push_back(operation_of(*part));
    check_types(waiting.back());
  }
  std::map<int64_t, Tensor> tensors;
  std::set<int64_t> produced;
  const auto meet = [&](const Tensor& t) {
    const auto [known, is_new] = tensors.emplace(t.id, t);
    check(is_new || known->second == t, "two tensors have the id ", t.id);
  };
  for (const Operation& o : waiting) {
    std::for_each(o.inputs.begin(), o.inputs.end(), meet);
    meet(o.output);
    check(produced.insert(o.output.id).second, "two operations produce tensor ", o.output.id);
  }
  for (const auto& [id, tensor] : tensors)
    check(!tensor.is_virtual || produced.contains(id), "no operation produces the virtual tensor ",
          id);
  while (!waiting.empty()) {
    const auto is_ready = [&](const Operation& o) {
      return std::none_of(o.inputs.begin(), o.inputs.end(),
                          [&](const Tensor& t) { return produced.contains(t.id); });
    };
    const auto next = std::find_if(waiting.begin(), waiting.end(), is_ready);
    check(next != waiting.end(), "operations that wait for each other");
    produced.erase(next->output.id);
    ordered.push_back(std::move(*next));
    waiting.erase(next);
  }
  return ordered;
}

}  // namespace stand_in
