// SPDX-License-Identifier: Apache-2.0
// Torch's current device and stream, and CUDA's errors; for host code of any compiler.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "layout.h"

namespace fastresnet::cuda {

using torch::stable::accelerator::DeviceGuard;

inline void check_cuda(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or torch would report it again, as the error of its next kernel
  throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(status));
}

inline cudaStream_t current_stream(const char* op, const Tensor& x) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) != TORCH_SUCCESS)
    throw std::runtime_error(std::string(op) + ": torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace fastresnet::cuda
