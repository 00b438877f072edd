// SPDX-License-Identifier: Apache-2.0
// The part of CUDA that csrc/cuda/conv.cpp calls by itself; defined in host.cpp.
#pragma once

#include <cstddef>

using cudaError_t = int;
using cudaStream_t = struct StreamOfCuda*;
constexpr cudaError_t cudaSuccess = 0;

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
