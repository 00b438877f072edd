// SPDX-License-Identifier: Apache-2.0
#include "cuda/cudnn_graph.h"

#include <stdexcept>

namespace fastresnet::cudnn {
namespace {

constexpr int64_t kAlignment = 16;  // bytes; of every tensor of ours
constexpr int64_t kMostConfigs = 32;

}  // namespace

Descriptor::Descriptor(DescriptorType type) {
  check_status(api().create_descriptor(type, &raw_), "a descriptor");
}

Descriptor::Descriptor(Descriptor&& other) noexcept : raw_(std::exchange(other.raw_, nullptr)) {}

Descriptor::~Descriptor() {
  if (raw_ != nullptr) api().destroy_descriptor(raw_);
}

void Descriptor::set(Attribute name, AttributeType type, int64_t count, const void* values) {
  check_status(api().set_attribute(raw_, name, type, count, values), "an attribute");
}

void Descriptor::finalize(const char* what) { check_status(api().finalize(raw_), what); }

Plan::Plan(Descriptor descriptor, std::vector<int64_t> memory)
    : descriptor_(std::move(descriptor)), memory_(std::move(memory)) {
  int64_t count = 0;
  check_status(api().get_attribute(descriptor_.raw(), kPlanWorkspaceSize, kTypeInt64, 1, &count,
                                   &workspace_bytes_),
               "a plan's workspace");
}

std::string Plan::engine() const {
  int64_t size = 0;
  const auto get = [&](int64_t room, char* text) {
    return api().get_attribute(descriptor_.raw(), kPlanJson, kTypeChar, room, &size, text);
  };
  if (get(0, nullptr) != 0) return "unknown";
  std::string text(static_cast<size_t>(size), '\0');
  if (get(size, text.data()) != 0) return "unknown";
  return text.substr(0, text.find('\0'));
}

void Plan::execute(Handle handle, const std::vector<void*>& addresses, void* workspace) const {
  Descriptor pack(kVariantPack);
  pack.set(kPackUniqueIds, memory_);
  pack.set(kPackPointers, kTypeVoidPointer, static_cast<int64_t>(addresses.size()),
           addresses.data());
  pack.set(kPackWorkspace, kTypeVoidPointer, 1, &workspace);
  pack.finalize("the tensors' addresses");
  check_status(api().execute(handle, descriptor_.raw(), pack.raw()), "a plan's execution");
}

Graph::TensorId Graph::tensor(const Sizes& sizes, DataType type, bool is_virtual) {
  const int64_t channels = sizes[1], row = channels * sizes[3];
  const auto id = static_cast<TensorId>(tensors_.size());
  Descriptor& t = tensors_.emplace_back(kTensor);
  t.set(kTensorDataType, type);
  t.set(kTensorDimensions, sizes);
  t.set(kTensorStrides, {row * sizes[2], 1, row, channels});
  t.set(kTensorUniqueId, id);
  t.set(kTensorAlignment, kAlignment);
  t.set(kTensorIsVirtual, kTypeBoolean, 1, &is_virtual);
  t.finalize("a tensor");
  if (!is_virtual) memory_.push_back(id);
  return id;
}

Graph::TensorId Graph::vector(const Sizes& sizes) {
  return tensor({1, sizes[1], 1, 1}, DataType::float32);
}

Descriptor Graph::convolution_descriptor(const Geometry& geometry) {
  Descriptor c(kConvolution);
  c.set(kConvolutionPrecision, DataType::float32);
  c.set(kConvolutionModeOf, kTypeConvolutionMode, 1, &kCrossCorrelation);
  c.set(kConvolutionSpatialDimensions, 2);
  c.set(kConvolutionDilations, {geometry.dilation, geometry.dilation});
  c.set(kConvolutionStrides, {geometry.stride, geometry.stride});
  c.set(kConvolutionPrePaddings, {geometry.padding, geometry.padding});
  c.set(kConvolutionPostPaddings, {geometry.padding, geometry.padding});
  c.finalize("a convolution");
  return c;
}

void Graph::convolution(TensorId x, TensorId filter, TensorId y, const Geometry& geometry) {
  const float alpha = 1, beta = 0;
  const Descriptor& c = details_.emplace_back(convolution_descriptor(geometry));
  Descriptor& o = operations_.emplace_back(kConvolutionForward);
  o.set(kForwardConvolution, c);
  o.set(kForwardX, tensors_[x]);
  o.set(kForwardW, tensors_[filter]);
  o.set(kForwardY, tensors_[y]);
  o.set(kForwardAlpha, kTypeFloat, 1, &alpha);
  o.set(kForwardBeta, kTypeFloat, 1, &beta);
  o.finalize("a convolution's forward");
}

void Graph::convolution_backward_data(TensorId dy, TensorId filter, TensorId dx,
                                      const Geometry& geometry) {
  const float alpha = 1, beta = 0;
  const Descriptor& c = details_.emplace_back(convolution_descriptor(geometry));
  Descriptor& o = operations_.emplace_back(kConvolutionBackwardData);
  o.set(kBackwardDataConvolution, c);
  o.set(kBackwardDataDy, tensors_[dy]);
  o.set(kBackwardDataW, tensors_[filter]);
  o.set(kBackwardDataDx, tensors_[dx]);
  o.set(kBackwardDataAlpha, kTypeFloat, 1, &alpha);
  o.set(kBackwardDataBeta, kTypeFloat, 1, &beta);
  o.finalize("a convolution's input gradient");
}

namespace {

Descriptor pointwise_descriptor(Pointwise mode) {
  Descriptor p(kPointwise);
  p.set(kPointwiseModeOf, kTypePointwiseMode, 1, &mode);
  p.set(kPointwisePrecision, DataType::float32);
  p.finalize("a pointwise function");
  return p;
}

}  // namespace

void Graph::pointwise(Pointwise mode, TensorId x, TensorId b, TensorId y) {
  const Descriptor& p = details_.emplace_back(pointwise_descriptor(mode));
  Descriptor& o = operations_.emplace_back(kPointwiseOperation);
  o.set(kPointwiseDescriptor, p);
  o.set(kPointwiseX, tensors_[x]);
  o.set(kPointwiseB, tensors_[b]);
  o.set(kPointwiseY, tensors_[y]);
  o.finalize("a pointwise operation");
}

void Graph::relu_backward(TensorId dy, TensorId x, TensorId dx) {
  const Descriptor& p = details_.emplace_back(pointwise_descriptor(Pointwise::relu_backward));
  Descriptor& o = operations_.emplace_back(kPointwiseOperation);
  o.set(kPointwiseDescriptor, p);
  o.set(kPointwiseDy, tensors_[dy]);
  o.set(kPointwiseX, tensors_[x]);
  o.set(kPointwiseDx, tensors_[dx]);
  o.finalize("a ReLU's backward");
}

void Graph::sum(TensorId x, TensorId y) {
  Descriptor& r = details_.emplace_back(kReduction);
  r.set(kReductionOperatorOf, kTypeReductionOperator, 1, &kSum);
  r.set(kReductionPrecision, DataType::float32);
  r.finalize("a reduction");
  Descriptor& o = operations_.emplace_back(kReductionOperation);
  o.set(kReductionDescriptor, r);
  o.set(kReductionX, tensors_[x]);
  o.set(kReductionY, tensors_[y]);
  o.finalize("a sum");
}

std::unique_ptr<Plan> Graph::plan(const Target& target) const {
  std::unique_ptr<Descriptor> device;
  if (target.handle == nullptr) {
    device = std::make_unique<Descriptor>(kDeviceProperties);
    device->set(kDeviceJson, kTypeChar, static_cast<int64_t>(target.device_json.size()),
                target.device_json.data());
    device->finalize("a device's description");
  }

  std::vector<BackendDescriptor> operations;
  for (const Descriptor& operation : operations_) operations.push_back(operation.raw());
  Descriptor graph(kOperationGraph);
  if (device == nullptr) graph.set(kGraphHandle, kTypeHandle, 1, &target.handle);
  graph.set(kGraphOperations, kTypeDescriptor, static_cast<int64_t>(operations.size()),
            operations.data());
  graph.finalize("a graph");

  std::string reason = "its heuristics propose none";
  for (const Heuristics mode : {Heuristics::by_model, Heuristics::fallback}) {
    Descriptor heuristics(kEngineHeuristics);
    heuristics.set(kHeuristicsGraph, graph);
    heuristics.set(kHeuristicsModeOf, kTypeHeuristicsMode, 1, &mode);
    if (device != nullptr) heuristics.set(kHeuristicsDevice, *device);
    if (api().finalize(heuristics.raw()) != 0) continue;  // nothing to propose

    std::vector<Descriptor> configs;
    std::vector<BackendDescriptor> raw;
    for (int64_t i = 0; i < kMostConfigs; ++i)
      raw.push_back(configs.emplace_back(kEngineConfig).raw());
    int64_t count = 0;
    if (api().get_attribute(heuristics.raw(), kHeuristicsResults, kTypeDescriptor, kMostConfigs,
                            &count, raw.data()) != 0)
      continue;
    for (int64_t i = 0; i < count; ++i) {
      Descriptor plan(kExecutionPlan);
      try {
        plan.set(kPlanEngineConfig, configs[i]);
        if (device != nullptr)
          plan.set(kPlanDevice, *device);
        else
          plan.set(kPlanHandle, kTypeHandle, 1, &target.handle);
        plan.finalize("a plan");
        return std::make_unique<Plan>(std::move(plan), memory_);
      } catch (const std::runtime_error& error) {
        reason = error.what();
      }
    }
  }
  throw std::runtime_error("cuDNN has no plan for this graph: " + reason);
}

}  // namespace fastresnet::cudnn
