// SPDX-License-Identifier: Apache-2.0
// Batch norm, ReLU and max-pool over square windows in one pass, as CUDA kernels, and the functions
// that launch them. As on the CPU, the normalised map is never stored: the forward leaves one byte
// a pooled value, its position in the window, and the backward gathers each pixel's gradient from
// the windows that cover it, so nothing is added atomically.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "batch_norm.h"
#include "cuda/normalisation.cuh"
#include "cuda/reduce.cuh"
#include "cuda/tile.cuh"
#include "cuda/vec.cuh"
#include "params.h"

namespace fastresnet::cuda {

struct PoolForwardParams {
  const void* x;  // [batch, height, width, channels]
  Normalisation norm;
  void* out;       // [batch, out_height, out_width, channels]
  uint8_t* index;  // like out
  PoolShape shape;
  Extent extent;  // of out
  DType dtype;
};

struct PoolBackwardParams {
  const void* grad;      // [batch, out_height, out_width, channels]
  const uint8_t* index;  // like grad
  const void* x;         // [batch, height, width, channels]
  Normalisation norm;    // without bias
  void* dx;              // like x
  float* dweight;        // [channels]
  float* dbias;          // [channels]
  float* sum_gx;         // [channels] scratch: sums of g * (x - mean)
  PoolShape shape;
  Extent extent;  // of x
  DType dtype;
  bool training;
};

// A pixel of a map of `height` by `width`, by its number.
struct Pixel {
  int image, row, column;

  __device__ __forceinline__ Pixel(int64_t number, int64_t height, int64_t width) {
    // 32 bits divide several times faster; the entry refuses more pixels than they count.
    const auto n = static_cast<unsigned>(number), w = static_cast<unsigned>(width);
    const unsigned line = n / w, h = static_cast<unsigned>(height);
    column = static_cast<int>(n % w);
    image = static_cast<int>(line / h);
    row = static_cast<int>(line % h);
  }
};

// The rows or columns of a window that lie on the image, or the windows that cover a pixel.
struct Span {
  int begin, end;
};

__device__ __forceinline__ Span span_on_image(int start, int64_t kernel, int64_t size) {
  const int k = static_cast<int>(kernel), left = static_cast<int>(size) - start;
  return {start < 0 ? -start : 0, left < k ? left : k};
}

__device__ __forceinline__ Span windows_over(int pixel, int64_t kernel, int64_t stride,
                                             int64_t padding, int64_t windows) {
  const int k = static_cast<int>(kernel), s = static_cast<int>(stride);
  const int at = pixel + static_cast<int>(padding), last = at / s + 1;
  const int n = static_cast<int>(windows);
  return {at < k ? 0 : (at - k) / s + 1, last < n ? last : n};
}

template <typename scalar_t, bool kPacked>
__global__ void __launch_bounds__(kPointwiseThreads, kResidentThreads / kPointwiseThreads)
    bn_relu_max_pool_kernel(PoolForwardParams p) {
  const auto* x = static_cast<const scalar_t*>(p.x);
  auto* out = static_cast<scalar_t*>(p.out);
  const PoolShape& s = p.shape;
  const Tile tile(p.extent);

  __shared__ Affine<float> shared[kBlockChannels];
  Affine<float> affine[kOctet];
  share_channels(tile, shared, affine, [&](int64_t c) { return p.norm.affine(c); });

  for (int64_t row = tile.row; row < tile.end; row += tile.step) {
    const Pixel pooled(row, s.out_height, s.out_width);
    const int top = pooled.row * static_cast<int>(s.stride) - static_cast<int>(s.padding);
    const int left = pooled.column * static_cast<int>(s.stride) - static_cast<int>(s.padding);
    const Span rows = span_on_image(top, s.kernel, s.height);
    const Span columns = span_on_image(left, s.kernel, s.width);
    float largest[kOctet];
    ByteOctet<kPacked> position;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      largest[i] = -INFINITY;
      position.values[i] = kNoPosition;
    }
    for (int i = rows.begin; i < rows.end; ++i)
      for (int j = columns.begin; j < columns.end; ++j) {
        const int64_t pixel = (pooled.image * s.height + top + i) * s.width + left + j;
        Octet<scalar_t, kPacked> octet;
        octet.load(x + tile.value_at(pixel), tile.valid);
        float z[kOctet];
        octet.widen(z);
#pragma unroll
        for (int c = 0; c < kOctet; ++c) {
          z[c] = fmaf(z[c], affine[c].scale, affine[c].shift);
          // As in torch, the first of equal values counts and the last of several NaN.
          const bool larger = z[c] > largest[c] || z[c] != z[c];
          largest[c] = larger ? z[c] : largest[c];
          position.values[c] = larger ? static_cast<uint8_t>(i * s.kernel + j) : position.values[c];
        }
      }
#pragma unroll
    for (int c = 0; c < kOctet; ++c) {
      if (relu_passes(largest[c])) continue;
      largest[c] = 0.0f;
      position.values[c] = kNoPosition;
    }
    Octet<scalar_t, kPacked> result;
    result.narrow(largest);
    result.store(out + tile.value_at(row), tile.valid);
    position.store(p.index + tile.value_at(row), tile.valid);
  }
}

// The gradient behind the ReLU of one pixel: that of the windows whose largest value it is.
template <typename scalar_t, bool kPacked>
__device__ __forceinline__ void gather_gradient(const PoolBackwardParams& p, const Tile& tile,
                                                int64_t number, float (&g)[kOctet]) {
  const PoolShape& s = p.shape;
  const auto* grad = static_cast<const scalar_t*>(p.grad);
  const Pixel pixel(number, s.height, s.width);
  const Span rows = windows_over(pixel.row, s.kernel, s.stride, s.padding, s.out_height);
  const Span columns = windows_over(pixel.column, s.kernel, s.stride, s.padding, s.out_width);
#pragma unroll
  for (int c = 0; c < kOctet; ++c) g[c] = 0.0f;
  for (int r = rows.begin; r < rows.end; ++r)
    for (int q = columns.begin; q < columns.end; ++q) {
      const int64_t at = tile.value_at((pixel.image * s.out_height + r) * s.out_width + q);
      const int down = pixel.row + static_cast<int>(s.padding) - r * static_cast<int>(s.stride);
      const int right = pixel.column + static_cast<int>(s.padding) - q * static_cast<int>(s.stride);
      const auto here = static_cast<uint8_t>(down * static_cast<int>(s.kernel) + right);
      ByteOctet<kPacked> position;
      Octet<scalar_t, kPacked> octet;
      position.load(p.index + at, tile.valid);
      octet.load(grad + at, tile.valid);
      float values[kOctet];
      octet.widen(values);
#pragma unroll
      for (int c = 0; c < kOctet; ++c) g[c] += position.values[c] == here ? values[c] : 0.0f;
    }
}

template <typename scalar_t, bool kPacked>
__global__ void __launch_bounds__(kReduceThreads, kResidentThreads / kReduceThreads)
    max_pool_backward_reduce_kernel(PoolBackwardParams p, Partials<OctetSums<2>> partials,
                                    unsigned* tickets) {
  const auto* x = static_cast<const scalar_t*>(p.x);
  const Tile tile(p.extent);
  __shared__ float shared[kBlockChannels];
  float mean[kOctet];
  share_channels(tile, shared, mean, [&](int64_t c) { return __ldg(p.norm.mean + c); });

  OctetSums<2> sums{};
  for (int64_t row = tile.row; row < tile.end; row += tile.step) {
    Octet<scalar_t, kPacked> octet;
    octet.load(x + tile.value_at(row), tile.valid);
    float value[kOctet], g[kOctet];
    gather_gradient<scalar_t, kPacked>(p, tile, row, g);
    octet.widen(value);
#pragma unroll
    for (int c = 0; c < kOctet; ++c) {
      sums.sum[0][c] += g[c];
      sums.sum[1][c] = fmaf(g[c], value[c] - mean[c], sums.sum[1][c]);
    }
  }

  if (!reduce_grid(sums, partials, tickets)) return;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (i >= tile.valid) continue;
    const int64_t c = tile.channel + i;
    store_global(p.dbias + c, sums.sum[0][i]);
    store_global(p.sum_gx + c, sums.sum[1][i]);
    store_global(p.dweight + c, weight_gradient(sums.sum[1][i], __ldg(p.norm.var + c), p.norm.eps));
  }
}

template <typename scalar_t, bool kPacked>
__global__ void __launch_bounds__(kPointwiseThreads, kResidentThreads / kPointwiseThreads)
    max_pool_backward_kernel(PoolBackwardParams p) {
  const auto* x = static_cast<const scalar_t*>(p.x);
  auto* dx = static_cast<scalar_t*>(p.dx);
  const Tile tile(p.extent);
  __shared__ ChannelGradient shared[kBlockChannels];
  ChannelGradient to_dx[kOctet];
  share_channels(tile, shared, to_dx, [&](int64_t c) {
    return channel_gradient(p.norm, p.dbias, p.sum_gx, p.extent.rows, p.training, c);
  });

  for (int64_t row = tile.row; row < tile.end; row += tile.step) {
    Octet<scalar_t, kPacked> octet;
    octet.load(x + tile.value_at(row), tile.valid);
    float value[kOctet], g[kOctet];
    gather_gradient<scalar_t, kPacked>(p, tile, row, g);
    octet.widen(value);
#pragma unroll
    for (int c = 0; c < kOctet; ++c) value[c] = to_dx[c](g[c], value[c]);
    octet.narrow(value);
    octet.store(dx + tile.value_at(row), tile.valid);
  }
}

// ---- Launches. They return the CUDA error of the first call that failed.

inline int64_t max_pool_workspace_bytes(int64_t rows, int64_t channels, const Queue& queue) {
  return workspace_bytes(rows, channels, sizeof(OctetSums<2>), queue);
}

// Whether the bytes of the index, too, are whole octets.
inline const void* index_octets(const uint8_t* index, int64_t channels) {
  const bool whole = channels % kOctet == 0 && reinterpret_cast<uintptr_t>(index) % kOctet == 0;
  return whole ? nullptr : reinterpret_cast<const void*>(uintptr_t{1});  // aligned to nothing
}

inline cudaError_t launch_max_pool_forward(const PoolForwardParams& p, const Queue& queue) {
  return dispatch_layout(
      p.dtype, p.extent.channels, {p.x, p.out, index_octets(p.index, p.extent.channels)},
      [&]<typename scalar_t, bool kPacked>() {
        return launch_pointwise(bn_relu_max_pool_kernel<scalar_t, kPacked>, p, queue);
      });
}

inline cudaError_t launch_max_pool_backward(const PoolBackwardParams& p, void* workspace,
                                            const Queue& queue) {
  return dispatch_layout(
      p.dtype, p.extent.channels, {p.grad, p.x, p.dx, index_octets(p.index, p.extent.channels)},
      [&]<typename scalar_t, bool kPacked>() {
        const cudaError_t status = launch_reduction(
            max_pool_backward_reduce_kernel<scalar_t, kPacked>, p, workspace, queue);
        if (status != cudaSuccess) return status;
        return launch_pointwise(max_pool_backward_kernel<scalar_t, kPacked>, p, queue);
      });
}

}  // namespace fastresnet::cuda
