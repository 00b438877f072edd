// SPDX-License-Identifier: Apache-2.0
// The part of cuDNN's graph API (its C backend API, version 9) that our convolutions need, declared
// by ourselves and looked up in whichever cuDNN torch has loaded. So neither cuDNN's headers nor
// its frontend's are needed to build, and no cuDNN to import. Numbers are those of cuDNN's ABI,
// held against its header by tests/test_cudnn_plans.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastresnet::cudnn {

using Handle = void*;
using BackendDescriptor = void*;
using Status = int;  // 0: success

constexpr size_t kOldestVersion = 90800;  // the first with descriptors of devices

enum DescriptorType : int {
  kPointwise = 0,
  kConvolution = 1,
  kEngineHeuristics = 4,
  kEngineConfig = 3,
  kExecutionPlan = 5,
  kConvolutionForward = 10,
  kConvolutionBackwardData = 12,
  kPointwiseOperation = 13,
  kOperationGraph = 15,
  kVariantPack = 16,
  kTensor = 17,
  kReduction = 21,
  kReductionOperation = 22,
  kDeviceProperties = 38,
};

enum AttributeType : int {
  kTypeHandle = 0,
  kTypeDataType = 1,
  kTypeBoolean = 2,
  kTypeInt64 = 3,
  kTypeFloat = 4,
  kTypeVoidPointer = 6,
  kTypeConvolutionMode = 7,
  kTypeHeuristicsMode = 8,
  kTypePointwiseMode = 14,
  kTypeDescriptor = 15,
  kTypeReductionOperator = 18,
  kTypeChar = 24,
};

enum Attribute : int {
  kPointwiseModeOf = 0,
  kPointwisePrecision = 1,
  kConvolutionPrecision = 100,
  kConvolutionModeOf = 101,
  kConvolutionDilations = 102,
  kConvolutionStrides = 103,
  kConvolutionPostPaddings = 104,
  kConvolutionPrePaddings = 105,
  kConvolutionSpatialDimensions = 106,
  kHeuristicsModeOf = 200,
  kHeuristicsGraph = 201,
  kHeuristicsResults = 202,
  kHeuristicsDevice = 204,
  kPlanHandle = 400,
  kPlanEngineConfig = 401,
  kPlanWorkspaceSize = 402,
  kPlanJson = 405,
  kPlanDevice = 407,
  kForwardAlpha = 700,
  kForwardBeta = 701,
  kForwardConvolution = 702,
  kForwardW = 703,
  kForwardX = 704,
  kForwardY = 705,
  kBackwardDataAlpha = 706,
  kBackwardDataBeta = 707,
  kBackwardDataConvolution = 708,
  kBackwardDataW = 709,
  kBackwardDataDx = 710,
  kBackwardDataDy = 711,
  kPointwiseDescriptor = 750,
  kPointwiseX = 751,
  kPointwiseB = 752,
  kPointwiseY = 753,
  kPointwiseDx = 756,
  kPointwiseDy = 757,
  kGraphHandle = 800,
  kGraphOperations = 801,
  kTensorAlignment = 900,
  kTensorDataType = 901,
  kTensorDimensions = 902,
  kTensorStrides = 903,
  kTensorUniqueId = 906,
  kTensorIsVirtual = 907,
  kPackUniqueIds = 1000,
  kPackPointers = 1001,
  kPackWorkspace = 1003,
  kReductionOperatorOf = 1600,
  kReductionPrecision = 1601,
  kReductionX = 1610,
  kReductionY = 1611,
  kReductionDescriptor = 1612,
  kDeviceJson = 2702,
};

enum class DataType : int { float32 = 0, float16 = 2, bfloat16 = 9, bit = 11 };
enum class Pointwise : int { add = 0, mul = 1, sub = 9, relu_backward = 200 };
enum class Heuristics : int { fallback = 2, by_model = 3 };  // "mode A" is the latter
constexpr int kSum = 0;                                      // of reductions
constexpr int kCrossCorrelation = 1;

// cuDNN's functions; of the library that is loaded, or none with the reason why.
struct Api {
  size_t (*get_version)();
  const char* (*get_error_string)(Status);
  void (*get_last_error_string)(char*, size_t);
  Status (*create)(Handle*);
  Status (*set_stream)(Handle, void*);
  Status (*create_descriptor)(DescriptorType, BackendDescriptor*);
  Status (*destroy_descriptor)(BackendDescriptor);
  Status (*finalize)(BackendDescriptor);
  Status (*set_attribute)(BackendDescriptor, Attribute, AttributeType, int64_t, const void*);
  Status (*get_attribute)(BackendDescriptor, Attribute, AttributeType, int64_t, int64_t*, void*);
  Status (*execute)(Handle, BackendDescriptor, BackendDescriptor);
};

// Throws std::runtime_error where there is no cuDNN, or one that is too old.
const Api& api();

// Throws std::runtime_error with cuDNN's own words unless `status` is success.
void check_status(Status status, const char* what);

}  // namespace fastresnet::cudnn
