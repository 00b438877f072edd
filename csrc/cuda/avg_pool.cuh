// SPDX-License-Identifier: Apache-2.0
// The average of each channel over an image, and its gradient, as CUDA kernels, and the functions
// that launch them. A thread adds up its channels of a whole image: no sum is merged, so results do
// not depend on the launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/tile.cuh"
#include "cuda/vec.cuh"
#include "params.h"

namespace fastresnet::cuda {

struct AvgPoolParams {
  const void* x;  // [batch, height, width, channels]
  void* out;      // [batch, channels]
  AvgPoolShape shape;
  Extent extent;  // of out
  DType dtype;
};

struct AvgPoolBackwardParams {
  const void* grad;  // [batch, channels]
  void* dx;          // [batch, height, width, channels]
  AvgPoolShape shape;
  Extent extent;  // of dx
  DType dtype;
};

template <typename scalar_t, bool kPacked>
__global__ void __launch_bounds__(kPointwiseThreads, kResidentThreads / kPointwiseThreads)
    global_avg_pool_kernel(AvgPoolParams p) {
  const auto* x = static_cast<const scalar_t*>(p.x);
  auto* out = static_cast<scalar_t*>(p.out);
  const int64_t height = p.shape.height, width = p.shape.width;
  const float share = 1.0f / static_cast<float>(height * width);
  // Pixels whose loads are in flight together. Unpacked ones have eight loads each already.
  [[maybe_unused]] constexpr int kPixels = kPacked ? 4 : 1;  // used by nvcc alone
  const Tile tile(p.extent);
  for (int64_t image = tile.row; image < tile.end; image += tile.step) {
    // Rows are added up one by one, then their sums: one long sum would lose more bits.
    float total[kOctet] = {};
    for (int64_t row = 0; row < height; ++row) {
      const int64_t first = (image * height + row) * width;
      float sum[kOctet] = {};
#pragma unroll kPixels
      for (int64_t column = 0; column < width; ++column) {
        Octet<scalar_t, kPacked> octet;
        octet.load(x + tile.value_at(first + column), tile.valid);
        float value[kOctet];
        octet.widen(value);
#pragma unroll
        for (int c = 0; c < kOctet; ++c) sum[c] += value[c];
      }
#pragma unroll
      for (int c = 0; c < kOctet; ++c) total[c] += sum[c];
    }
#pragma unroll
    for (int c = 0; c < kOctet; ++c) total[c] *= share;
    Octet<scalar_t, kPacked> result;
    result.narrow(total);
    result.store(out + tile.value_at(image), tile.valid);
  }
}

template <typename scalar_t, bool kPacked>
__global__ void __launch_bounds__(kPointwiseThreads, kResidentThreads / kPointwiseThreads)
    global_avg_pool_backward_kernel(AvgPoolBackwardParams p) {
  const auto* grad = static_cast<const scalar_t*>(p.grad);
  auto* dx = static_cast<scalar_t*>(p.dx);
  const int64_t pixels = p.shape.height * p.shape.width;
  const float share = 1.0f / static_cast<float>(pixels);
  const Tile tile(p.extent);
  for (int64_t row = tile.row; row < tile.end; row += tile.step) {
    Octet<scalar_t, kPacked> octet;
    octet.load(grad + tile.value_at(row / pixels), tile.valid);
    float value[kOctet];
    octet.widen(value);
#pragma unroll
    for (int c = 0; c < kOctet; ++c) value[c] *= share;
    octet.narrow(value);
    octet.store(dx + tile.value_at(row), tile.valid);
  }
}

// ---- Launches. They return the CUDA error of the first call that failed.

inline cudaError_t launch_global_avg_pool(const AvgPoolParams& p, const Queue& queue) {
  return dispatch_layout(
      p.dtype, p.extent.channels, {p.x, p.out}, [&]<typename scalar_t, bool kPacked>() {
        return launch_pointwise(global_avg_pool_kernel<scalar_t, kPacked>, p, queue);
      });
}

inline cudaError_t launch_global_avg_pool_backward(const AvgPoolBackwardParams& p,
                                                   const Queue& queue) {
  return dispatch_layout(
      p.dtype, p.extent.channels, {p.grad, p.dx}, [&]<typename scalar_t, bool kPacked>() {
        return launch_pointwise(global_avg_pool_backward_kernel<scalar_t, kPacked>, p, queue);
      });
}

}  // namespace fastresnet::cuda
