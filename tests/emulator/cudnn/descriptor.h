// SPDX-License-Identifier: Apache-2.0
// The descriptors of the stand-in for cuDNN (cudnn.cpp): which attributes each has, and their
// values.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/cudnn_api.h"

namespace stand_in {

using namespace fastresnet::cudnn;

constexpr Status kBadParameter = 2000, kNotSupported = 3000, kExecutionFailed = 5000;

struct Error {
  Status status;
  std::string words;
};

template <class... Words>
void require(bool ok, Status status, const Words&... words) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << words);
  throw Error{status, text.str()};
}

template <class... Words>
void check(bool ok, const Words&... words) {
  require(ok, kBadParameter, words...);
}

template <class... Words>
void check_support(bool ok, const Words&... words) {
  require(ok, kNotSupported, words...);
}

// An attribute: its type and how many values it has, 0 for any number but none.
struct Rule {
  Attribute attribute;
  const char* name;
  AttributeType type;
  int64_t count = 1;
};

inline const std::vector<Rule>& rules_of(DescriptorType type) {
  static const std::map<DescriptorType, std::vector<Rule>> rules{
      {kTensor,
       {{kTensorDataType, "data type", kTypeDataType},
        {kTensorDimensions, "dimensions", kTypeInt64, 4},
        {kTensorStrides, "strides", kTypeInt64, 4},
        {kTensorUniqueId, "unique id", kTypeInt64},
        {kTensorAlignment, "alignment", kTypeInt64},
        {kTensorIsVirtual, "whether it is virtual", kTypeBoolean}}},
      {kConvolution,
       {{kConvolutionPrecision, "precision", kTypeDataType},
        {kConvolutionModeOf, "mode", kTypeConvolutionMode},
        {kConvolutionSpatialDimensions, "spatial dimensions", kTypeInt64},
        {kConvolutionDilations, "dilations", kTypeInt64, 2},
        {kConvolutionStrides, "strides", kTypeInt64, 2},
        {kConvolutionPrePaddings, "paddings before", kTypeInt64, 2},
        {kConvolutionPostPaddings, "paddings behind", kTypeInt64, 2}}},
      {kConvolutionForward,
       {{kForwardConvolution, "convolution", kTypeDescriptor},
        {kForwardX, "x", kTypeDescriptor},
        {kForwardW, "w", kTypeDescriptor},
        {kForwardY, "y", kTypeDescriptor},
        {kForwardAlpha, "alpha", kTypeFloat},
        {kForwardBeta, "beta", kTypeFloat}}},
      {kConvolutionBackwardData,
       {{kBackwardDataConvolution, "convolution", kTypeDescriptor},
        {kBackwardDataDy, "dy", kTypeDescriptor},
        {kBackwardDataW, "w", kTypeDescriptor},
        {kBackwardDataDx, "dx", kTypeDescriptor},
        {kBackwardDataAlpha, "alpha", kTypeFloat},
        {kBackwardDataBeta, "beta", kTypeFloat}}},
      {kPointwise,
       {{kPointwiseModeOf, "mode", kTypePointwiseMode},
        {kPointwisePrecision, "precision", kTypeDataType}}},
      {kPointwiseOperation,
       {{kPointwiseDescriptor, "pointwise function", kTypeDescriptor},
        {kPointwiseX, "x", kTypeDescriptor},
        {kPointwiseB, "b", kTypeDescriptor},
        {kPointwiseY, "y", kTypeDescriptor},
        {kPointwiseDy, "dy", kTypeDescriptor},
        {kPointwiseDx, "dx", kTypeDescriptor}}},
      {kReduction,
       {{kReductionOperatorOf, "operator", kTypeReductionOperator},
        {kReductionPrecision, "precision", kTypeDataType}}},
      {kReductionOperation,
       {{kReductionDescriptor, "reduction", kTypeDescriptor},
        {kReductionX, "x", kTypeDescriptor},
        {kReductionY, "y", kTypeDescriptor}}},
      {kOperationGraph,
       {{kGraphOperations, "operations", kTypeDescriptor, 0},
        {kGraphHandle, "handle", kTypeHandle}}},
      {kDeviceProperties, {{kDeviceJson, "JSON", kTypeChar, 0}}},
      {kEngineHeuristics,
       {{kHeuristicsGraph, "graph", kTypeDescriptor},
        {kHeuristicsModeOf, "mode", kTypeHeuristicsMode},
        {kHeuristicsDevice, "device", kTypeDescriptor}}},
      {kEngineConfig, {}},
      {kExecutionPlan,
       {{kPlanEngineConfig, "engine config", kTypeDescriptor},
        {kPlanHandle, "handle", kTypeHandle},
        {kPlanDevice, "device", kTypeDescriptor}}},
      {kVariantPack,
       {{kPackUniqueIds, "unique ids", kTypeInt64, 0},
        {kPackPointers, "pointers", kTypeVoidPointer, 0},
        {kPackWorkspace, "workspace", kTypeVoidPointer}}},
  };
  const auto found = rules.find(type);
  check_support(found != rules.end(), "no descriptor of type ", type, " is known");
  return found->second;
}

inline bool is_optional(Attribute name) {
  static const std::set<Attribute> names{kPointwiseB,  kPointwiseY,  kPointwiseDy,
                                         kPointwiseDx, kGraphHandle, kHeuristicsDevice,
                                         kPlanHandle,  kPlanDevice};
  return names.contains(name);
}

inline size_t size_of(AttributeType type) {
  switch (type) {
    case kTypeBoolean:
    case kTypeChar:
      return 1;
    case kTypeHandle:
    case kTypeInt64:
    case kTypeVoidPointer:
      return 8;
    default:
      return 4;
  }
}

struct Descriptor {
  DescriptorType type;
  bool is_finalized = false;
  std::map<Attribute, std::vector<char>> values;
  std::map<Attribute, std::vector<std::shared_ptr<const Descriptor>>> parts;
  int engine = 0;               // of an engine config
  int64_t workspace_bytes = 0;  // of a plan

  bool has(Attribute name) const { return values.contains(name) || parts.contains(name); }

  template <class T>
  std::vector<T> all(Attribute name) const {
    const std::vector<char>& bytes = values.at(name);
    std::vector<T> found(bytes.size() / sizeof(T));
    std::memcpy(found.data(), bytes.data(), bytes.size());
    return found;
  }

  template <class T>
  T one(Attribute name) const {
    return all<T>(name).front();
  }

  const Descriptor& part(Attribute name, DescriptorType wanted) const {
    check(parts.contains(name), "no attribute ", name, " is set");
    const Descriptor& found = *parts.at(name).front();
    check(found.type == wanted, "attribute ", name, " is of type ", found.type, ", not ", wanted);
    return found;
  }
};

}  // namespace stand_in
