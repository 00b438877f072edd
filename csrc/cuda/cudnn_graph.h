// SPDX-License-Identifier: Apache-2.0
// Graphs of operations that cuDNN plans as one kernel where it can: tensors by number, operations
// between them, then a plan for a device, which need not be there.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/cudnn_api.h"

namespace fastresnet::cudnn {

class Descriptor {
 public:
  explicit Descriptor(DescriptorType type);
  Descriptor(Descriptor&& other) noexcept;
  Descriptor& operator=(Descriptor&&) = delete;
  ~Descriptor();

  void set(Attribute name, AttributeType type, int64_t count, const void* values);
  void set(Attribute name, int64_t value) { set(name, kTypeInt64, 1, &value); }
  void set(Attribute name, const std::vector<int64_t>& values) {
    set(name, kTypeInt64, static_cast<int64_t>(values.size()), values.data());
  }
  void set(Attribute name, DataType value) { set(name, kTypeDataType, 1, &value); }
  void set(Attribute name, const Descriptor& value) { set(name, kTypeDescriptor, 1, &value.raw_); }
  void finalize(const char* what);

  BackendDescriptor raw() const { return raw_; }

 private:
  BackendDescriptor raw_ = nullptr;
};

// What a plan is made for: the device of a handle, or one described in cuDNN's JSON.
struct Target {
  Handle handle = nullptr;
  std::string device_json;
};

class Plan {
 public:
  Plan(Descriptor descriptor, std::vector<int64_t> memory);

  int64_t workspace_bytes() const { return workspace_bytes_; }
  std::string engine() const;  // as cuDNN describes it

  // `addresses` are those of the graph's tensors that are not virtual, in the order in which it got
  // them. On the stream that the handle was given.
  void execute(Handle handle, const std::vector<void*>& addresses, void* workspace) const;

 private:
  Descriptor descriptor_;
  std::vector<int64_t> memory_;
  int64_t workspace_bytes_ = 0;
};

// Sizes [N, C, H, W]; a filter's are [K, C, R, S].
using Sizes = std::vector<int64_t>;

struct Geometry {
  int64_t stride, padding, dilation;
};

class Graph {
 public:
  using TensorId = int64_t;

  // channels_last; tensors that are not virtual have memory.
  TensorId tensor(const Sizes& sizes, DataType type, bool is_virtual = false);
  // Float32, one a channel of `sizes`.
  TensorId vector(const Sizes& sizes);
  // Float32 that is never stored.
  TensorId between(const Sizes& sizes) { return tensor(sizes, DataType::float32, true); }

  void convolution(TensorId x, TensorId filter, TensorId y, const Geometry& geometry);
  void convolution_backward_data(TensorId dy, TensorId filter, TensorId dx,
                                 const Geometry& geometry);
  // y = mode(x, b), where b may be a vector.
  void pointwise(Pointwise mode, TensorId x, TensorId b, TensorId y);
  // dx = x > 0 ? dy : 0
  void relu_backward(TensorId dy, TensorId x, TensorId dx);
  // Sums over all but the channels.
  void sum(TensorId x, TensorId y);

  // The first of the plans that cuDNN's heuristics propose which can be made. Throws
  // std::runtime_error where none can.
  std::unique_ptr<Plan> plan(const Target& target) const;

 private:
  Descriptor convolution_descriptor(const Geometry& geometry);

  std::vector<Descriptor> tensors_;
  std::vector<TensorId> memory_;     // of tensors_, those that are not virtual
  std::vector<Descriptor> details_;  // of the operations
  std::vector<Descriptor> operations_;
};

}  // namespace fastresnet::cudnn
