// SPDX-License-Identifier: Apache-2.0
// What the CUDA entries share: torch's current stream, scratch memory, a batch norm's vectors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "check.h"
#include "cuda/normalisation.cuh"
#include "cuda/tile.cuh"

namespace fastresnet::cuda {

using torch::stable::accelerator::DeviceGuard;

inline void check_cuda(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or torch would report it again, as the error of its next kernel
  throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(status));
}

inline Queue current_queue(const char* op, const Tensor& x) {
  const int32_t device = x.get_device_index();
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != TORCH_SUCCESS)
    throw std::runtime_error(std::string(op) + ": torch has no current CUDA stream");
  Queue queue{static_cast<cudaStream_t>(stream), 0};
  check_cuda(
      op, cudaDeviceGetAttribute(&queue.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return queue;
}

inline Extent extent_of(const Tensor& x) { return {x.numel() / x.size(1), x.size(1), 0}; }

// Torch's allocator hands out addresses aligned to far more than the 16 bytes that the kernels ask.
inline Tensor empty_bytes(const Tensor& like, int64_t size) {
  return torch::stable::empty({size}, ScalarType::Byte, std::nullopt, like.device());
}

// The four vectors of one batch norm as an operator receives them, under the names of its schema.
// A backward operator that needs no bias leaves it out.
struct NormalisationTensors {
  const Tensor& mean;
  const Tensor& var;
  const Tensor& weight;
  const Tensor* bias;
  double eps;
  const char* prefix = "";

  Normalisation checked(const char* op, const Tensor& x) const {
    const auto vector = [&](const char* name, const Tensor& t) {
      return check_vector(op, (std::string(prefix) + name).c_str(), t, x);
    };
    return {vector("mean", mean), vector("var", var), vector("weight", weight),
            bias == nullptr ? nullptr : vector("bias", *bias), static_cast<float>(eps)};
  }
};

}  // namespace fastresnet::cuda
