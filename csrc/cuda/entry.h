// SPDX-License-Identifier: Apache-2.0
// What the entries of our kernels share: their queue, scratch memory, a batch norm's vectors.
#pragma once

#include <string>

#include "check.h"
#include "cuda/normalisation.cuh"
#include "cuda/stream.h"
#include "cuda/tile.cuh"

namespace fastresnet::cuda {

inline Queue current_queue(const char* op, const Tensor& x) {
  Queue queue{current_stream(op, x), 0};
  check_cuda(op, cudaDeviceGetAttribute(&queue.multiprocessors, cudaDevAttrMultiProcessorCount,
                                        x.get_device_index()));
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
