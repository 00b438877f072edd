// SPDX-License-Identifier: Apache-2.0
// Batch norm with its epilogue over [rows, channels] (channels_last): statistics, forward and
// backward as CUDA kernels, and the functions that launch them. Plain pointers, no torch types: the
// tensors are in bn_act.cu, and tests/emulator runs this same file on the host.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "batch_norm.h"
#include "cuda/normalisation.cuh"
#include "cuda/reduce.cuh"
#include "cuda/tile.cuh"
#include "cuda/vec.cuh"
#include "params.h"

namespace fastresnet::cuda {

struct StatsParams {
  const void* x;      // [rows, channels]
  const float* sums;  // [2, channels] of x and of x * x, where somebody knows them; else null
  float* mean;        // [channels]
  float* var;         // [channels], biased
  Extent extent;
  DType dtype;
};

struct ForwardParams {
  const void* x;  // [rows, channels]
  Normalisation norm;
  const void* residual;         // [rows, channels], for add_relu and add_bn_relu
  Normalisation residual_norm;  // for add_bn_relu
  void* out;                    // [rows, channels]
  uint8_t* mask;                // [rows, mask_bytes(channels)], for add_relu and add_bn_relu
  Extent extent;
  DType dtype;
  Epilogue epilogue;
};

// The forms with a residual write `masked_grad`, the gradient behind the activation: of the first
// pass it is a result, and the second reads it instead of everything that it was made of.
struct BackwardParams {
  const void* grad;             // [rows, channels]
  const void* shortcut_grad;    // [rows, channels], or null: added to grad, for a residual's forms
  const uint8_t* mask;          // [rows, mask_bytes(channels)], for add_relu and add_bn_relu
  const void* x;                // [rows, channels]
  Normalisation norm;           // bias for relu only: its mask is computed again
  const void* residual;         // [rows, channels], for add_bn_relu
  Normalisation residual_norm;  // for add_bn_relu
  void* masked_grad;            // [rows, channels], for add_relu (its dresidual) and add_bn_relu
  void* dx;                     // [rows, channels]
  void* dresidual;              // [rows, channels], for add_bn_relu
  float* dweight;               // [channels]
  float* dbias;                 // [channels]
  float* dresidual_weight;      // [channels], for add_bn_relu
  float* sum_gx;                // [channels] scratch: sums of g * (x - mean)
  float* sum_gr;                // [channels] scratch, for add_bn_relu
  Extent extent;
  DType dtype;
  Epilogue epilogue;
  bool training;
};

// ---- Statistics.

struct alignas(16) OctetMoments {
  float mean[kOctet], m2[kOctet], count;

  template <int kRows>
  static __device__ __forceinline__ OctetMoments of(const float (&values)[kRows][kOctet]) {
    OctetMoments moments{};
    moments.count = kRows;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < kRows; ++k) sum += values[k][i];
      moments.mean[i] = sum * (1.0f / kRows);
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const float delta = values[k][i] - moments.mean[i];
        moments.m2[i] += delta * delta;
      }
    }
    return moments;
  }

  // As merge() of batch_norm.h, but the octet shares one count, so one division and no branch: per
  // channel they would be most of the work of bn_stats_kernel.
  __device__ __forceinline__ void merge(const OctetMoments& other) {
    const float total = count + other.count;
    const float share = total == 0.0f ? 0.0f : other.count / total;
    const float spread = count * share;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const float delta = other.mean[i] - mean[i];
      mean[i] = fmaf(delta, share, mean[i]);
      m2[i] = fmaf(delta * delta, spread, m2[i] + other.m2[i]);
    }
    count = total;
  }
};

// A plain sum of squares loses its digits where the mean is large beside the deviation: up to this
// square of their quotient it keeps all but two of the seven that float32 has.
constexpr float kMostSquaredMean = 100.0f;

struct MomentsOfSums {
  float mean, var;

  static __device__ __forceinline__ MomentsOfSums of(const StatsParams& p, int64_t c) {
    const float count = static_cast<float>(p.extent.rows);
    const float mean = __ldg(p.sums + c) / count;
    const float mean_square = __ldg(p.sums + p.extent.channels + c) / count;
    return {mean, fmaf(-mean, mean, mean_square)};
  }

  // Not for NaN either.
  __device__ __forceinline__ bool is_exact() const {
    return mean * mean <= kMostSquaredMean * var || (mean == 0.0f && var == 0.0f);
  }
};

// With kOfSums x is read only for those 64 channels, if any, whose sums say too little.
template <typename scalar_t, bool kOfSums, bool kPacked>
__global__ void __launch_bounds__(kReduceThreads, kResidentThreads / kReduceThreads)
    bn_stats_kernel(StatsParams p, Partials<OctetMoments> partials, unsigned* tickets) {
  const auto* x = static_cast<const scalar_t*>(p.x);
  const Tile tile(p.extent);

  if constexpr (kOfSums) {
    __shared__ MomentsOfSums shared[kBlockChannels];
    MomentsOfSums own[kOctet];
    share_channels(tile, shared, own, [&](int64_t c) { return MomentsOfSums::of(p, c); });
    bool exact = true;  // in every block of this column alike
    for (int i = 0; i < static_cast<int>(blockDim.x) * kOctet; ++i) exact &= shared[i].is_exact();
    if (exact) {
      if (blockIdx.y != 0 || threadIdx.y != 0) return;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        if (i >= tile.valid) continue;
        store_global(p.mean + tile.channel + i, own[i].mean);
        store_global(p.var + tile.channel + i, own[i].var);
      }
      return;
    }
  }

  OctetMoments moments{};
  for_rows<kPacked ? 4 : 1>(tile, [&](int64_t row, auto rows) {
    Octet<scalar_t, kPacked> octets[rows];
    float values[rows][kOctet];
#pragma unroll
    for (int k = 0; k < rows; ++k)
      octets[k].load(x + tile.value_at(row + k * tile.step), tile.valid);
#pragma unroll
    for (int k = 0; k < rows; ++k) octets[k].widen(values[k]);
    moments.merge(OctetMoments::of(values));
  });

  if (!reduce_grid(moments, partials, tickets)) return;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (i >= tile.valid) continue;
    const Moments<float> m{moments.count, moments.mean[i], moments.m2[i]};
    store_global(p.mean + tile.channel + i, m.mean);
    store_global(p.var + tile.channel + i, m.biased_variance());
  }
}

// ---- The factor alone, for those who normalise by themselves.

struct ScaleParams {
  const float* var;
  const float* weight;
  float* scale;
  int64_t channels;
  float eps;
};

static __global__ void bn_scale_kernel(ScaleParams p) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c < p.channels)
    store_global(p.scale + c, __ldg(p.weight + c) * inverse_std(__ldg(p.var + c), p.eps));
}

// ---- Forward.

template <typename scalar_t, Epilogue kEpilogue, bool kPacked>
__global__ void __launch_bounds__(kPointwiseThreads, kResidentThreads / kPointwiseThreads)
    bn_forward_kernel(ForwardParams p) {
  const auto* x = static_cast<const scalar_t*>(p.x);
  const auto* residual = static_cast<const scalar_t*>(p.residual);
  auto* out = static_cast<scalar_t*>(p.out);
  const Tile tile(p.extent);

  __shared__ Affine<float> shared[2][kBlockChannels];
  Affine<float> affine[kOctet], residual_affine[kOctet];
  share_channels(tile, shared[0], affine, [&](int64_t c) { return p.norm.affine(c); });
  if constexpr (kEpilogue == Epilogue::add_bn_relu)
    share_channels(tile, shared[1], residual_affine,
                   [&](int64_t c) { return p.residual_norm.affine(c); });

  for_rows<kPacked ? 2 : 1>(tile, [&](int64_t row, auto rows) {
    Octet<scalar_t, kPacked> octets[rows];
    [[maybe_unused]] Octet<scalar_t, kPacked> residual_octets[rows];
#pragma unroll
    for (int k = 0; k < rows; ++k) {
      const int64_t at = tile.value_at(row + k * tile.step);
      octets[k].load(x + at, tile.valid);
      if constexpr (has_residual(kEpilogue)) residual_octets[k].load(residual + at, tile.valid);
    }
#pragma unroll
    for (int k = 0; k < rows; ++k) {
      float z[kOctet];
      [[maybe_unused]] float r[kOctet];
      octets[k].widen(z);
      if constexpr (has_residual(kEpilogue)) residual_octets[k].widen(r);
      [[maybe_unused]] unsigned passes =
          0;  // of a channel that is not there: z is 0, the bit stays clear
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        z[i] = fmaf(z[i], affine[i].scale, affine[i].shift);
        if constexpr (kEpilogue == Epilogue::add_relu) z[i] += r[i];
        if constexpr (kEpilogue == Epilogue::add_bn_relu)
          z[i] += fmaf(r[i], residual_affine[i].scale, residual_affine[i].shift);
        if constexpr (kEpilogue != Epilogue::none) {
          const bool pass = relu_passes(z[i]);
          passes |= static_cast<unsigned>(pass) << i;
          z[i] = pass ? z[i] : 0.0f;
        }
      }
      octets[k].narrow(z);
      octets[k].store(out + tile.value_at(row + k * tile.step), tile.valid);
      if constexpr (has_residual(kEpilogue))
        store_global(p.mask + tile.mask_at(row + k * tile.step), static_cast<uint8_t>(passes));
    }
  });
}

// ---- Backward: sums over the rows, then dx from them.

// Sums of g, of g * (x - mean) and, for add_bn_relu, of g * (residual - residual_mean).
template <Epilogue kEpilogue>
using BackwardSums = OctetSums<kEpilogue == Epilogue::add_bn_relu ? 3 : 2>;

// What the first pass reads of one row.
template <typename scalar_t, Epilogue kEpilogue, bool kTwoGradients, bool kPacked>
struct BackwardRow {
  Octet<scalar_t, kPacked> grad, shortcut_grad, x, residual;
  unsigned mask;

  __device__ __forceinline__ void load(const BackwardParams& p, const Tile& tile, int64_t row) {
    const int64_t at = tile.value_at(row);
    grad.load(static_cast<const scalar_t*>(p.grad) + at, tile.valid);
    if constexpr (kTwoGradients)
      shortcut_grad.load(static_cast<const scalar_t*>(p.shortcut_grad) + at, tile.valid);
    x.load(static_cast<const scalar_t*>(p.x) + at, tile.valid);
    if constexpr (kEpilogue == Epilogue::add_bn_relu)
      residual.load(static_cast<const scalar_t*>(p.residual) + at, tile.valid);
    if constexpr (has_residual(kEpilogue)) mask = __ldg(p.mask + tile.mask_at(row));
  }

  // x and the gradient behind the activation, which is rounded as autograd would round the sum of
  // both. `affine` is the forward's, for relu.
  __device__ __forceinline__ void widen(const Affine<float> (&affine)[kOctet],
                                        float (&value)[kOctet], float (&g)[kOctet]) {
    x.widen(value);
    grad.widen(g);
    if constexpr (kTwoGradients) {
      float other[kOctet];
      shortcut_grad.widen(other);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) g[i] += other[i];
      grad.narrow(g);
      grad.widen(g);
    }
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      bool pass = true;
      if constexpr (kEpilogue == Epilogue::relu)
        pass = relu_passes(fmaf(value[i], affine[i].scale, affine[i].shift));
      if constexpr (has_residual(kEpilogue)) pass = (mask >> i) & 1u;
      if (!pass) g[i] = 0.0f;
    }
  }
};

template <typename scalar_t, Epilogue kEpilogue, bool kTwoGradients, bool kPacked>
__global__ void __launch_bounds__(kReduceThreads, kResidentThreads / kReduceThreads)
    bn_backward_reduce_kernel(BackwardParams p, Partials<BackwardSums<kEpilogue>> partials,
                              unsigned* tickets) {
  constexpr bool kDual = kEpilogue == Epilogue::add_bn_relu;
  auto* masked_grad = static_cast<scalar_t*>(p.masked_grad);
  const Tile tile(p.extent);

  __shared__ float shared[2][kBlockChannels];
  float mean[kOctet], residual_mean[kOctet];
  share_channels(tile, shared[0], mean, [&](int64_t c) { return __ldg(p.norm.mean + c); });
  if constexpr (kDual)
    share_channels(tile, shared[1], residual_mean,
                   [&](int64_t c) { return __ldg(p.residual_norm.mean + c); });
  Affine<float> affine[kOctet];
  if constexpr (kEpilogue == Epilogue::relu) {
    __shared__ Affine<float> shared_affine[kBlockChannels];
    share_channels(tile, shared_affine, affine, [&](int64_t c) { return p.norm.affine(c); });
  }

  BackwardSums<kEpilogue> sums{};
  for_rows<kPacked ? 2 : 1>(tile, [&](int64_t row, auto rows) {
    BackwardRow<scalar_t, kEpilogue, kTwoGradients, kPacked> loaded[rows];
#pragma unroll
    for (int k = 0; k < rows; ++k) loaded[k].load(p, tile, row + k * tile.step);
#pragma unroll
    for (int k = 0; k < rows; ++k) {
      float x[kOctet], g[kOctet];
      [[maybe_unused]] float r[kOctet];
      loaded[k].widen(affine, x, g);
      if constexpr (kDual) loaded[k].residual.widen(r);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        sums.sum[0][i] += g[i];
        sums.sum[1][i] = fmaf(g[i], x[i] - mean[i], sums.sum[1][i]);
        if constexpr (kDual) sums.sum[2][i] = fmaf(g[i], r[i] - residual_mean[i], sums.sum[2][i]);
      }
      if constexpr (has_residual(kEpilogue)) {
        loaded[k].grad.narrow(g);
        loaded[k].grad.store(masked_grad + tile.value_at(row + k * tile.step), tile.valid);
      }
    }
  });

  if (!reduce_grid(sums, partials, tickets)) return;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (i >= tile.valid) continue;
    const int64_t c = tile.channel + i;
    store_global(p.dbias + c, sums.sum[0][i]);
    store_global(p.sum_gx + c, sums.sum[1][i]);
    if constexpr (kDual) store_global(p.sum_gr + c, sums.sum[2][i]);
  }
}

__device__ __forceinline__ void store_weight_gradient(float* dweight, const Normalisation& norm,
                                                      const float* sum_gx, int64_t c) {
  store_global(dweight + c, weight_gradient(__ldg(sum_gx + c), __ldg(norm.var + c), norm.eps));
}

// With add_bn_relu the gradient is already masked, and there is none for add_relu: it is none's.
template <typename scalar_t, Epilogue kEpilogue, bool kPacked>
__global__ void __launch_bounds__(kPointwiseThreads, kResidentThreads / kPointwiseThreads)
    bn_backward_kernel(BackwardParams p) {
  constexpr bool kDual = kEpilogue == Epilogue::add_bn_relu;
  const auto* x = static_cast<const scalar_t*>(p.x);
  const auto* grad = static_cast<const scalar_t*>(kDual ? p.masked_grad : p.grad);
  const auto* residual = static_cast<const scalar_t*>(p.residual);
  auto* dx = static_cast<scalar_t*>(p.dx);
  auto* dresidual = static_cast<scalar_t*>(p.dresidual);
  const Tile tile(p.extent);

  __shared__ ChannelGradient shared[2][kBlockChannels];
  ChannelGradient to_dx[kOctet], to_dresidual[kOctet];
  share_channels(tile, shared[0], to_dx, [&](int64_t c) {
    if (blockIdx.y == 0) store_weight_gradient(p.dweight, p.norm, p.sum_gx, c);
    return channel_gradient(p.norm, p.dbias, p.sum_gx, p.extent.rows, p.training, c);
  });
  if constexpr (kDual)
    share_channels(tile, shared[1], to_dresidual, [&](int64_t c) {
      if (blockIdx.y == 0) store_weight_gradient(p.dresidual_weight, p.residual_norm, p.sum_gr, c);
      return channel_gradient(p.residual_norm, p.dbias, p.sum_gr, p.extent.rows, p.training, c);
    });
  Affine<float> affine[kOctet];
  if constexpr (kEpilogue == Epilogue::relu) {
    __shared__ Affine<float> shared_affine[kBlockChannels];
    share_channels(tile, shared_affine, affine, [&](int64_t c) { return p.norm.affine(c); });
  }

  // With two coefficient sets in registers there is no room for a second row of three octets.
  for_rows<kPacked && !kDual ? 2 : 1>(tile, [&](int64_t row, auto rows) {
    Octet<scalar_t, kPacked> grads[rows], values[rows];
    [[maybe_unused]] Octet<scalar_t, kPacked> residuals[rows];
#pragma unroll
    for (int k = 0; k < rows; ++k) {
      const int64_t at = tile.value_at(row + k * tile.step);
      grads[k].load(grad + at, tile.valid);
      values[k].load(x + at, tile.valid);
      if constexpr (kDual) residuals[k].load(residual + at, tile.valid);
    }
#pragma unroll
    for (int k = 0; k < rows; ++k) {
      const int64_t at = tile.value_at(row + k * tile.step);
      float g[kOctet], value[kOctet];
      grads[k].widen(g);
      if constexpr (kDual) {
        residuals[k].widen(value);
#pragma unroll
        for (int i = 0; i < kOctet; ++i) value[i] = to_dresidual[i](g[i], value[i]);
        residuals[k].narrow(value);
        residuals[k].store(dresidual + at, tile.valid);
      }
      values[k].widen(value);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        bool pass = true;
        if constexpr (kEpilogue == Epilogue::relu)
          pass = relu_passes(fmaf(value[i], affine[i].scale, affine[i].shift));
        value[i] = to_dx[i](pass ? g[i] : 0.0f, value[i]);
      }
      values[k].narrow(value);
      values[k].store(dx + at, tile.valid);
    }
  });
}

// ---- Launches. They return the CUDA error of the first call that failed.

// Scratch memory, 16-byte aligned, that launch_bn_stats and launch_bn_backward need.
inline int64_t bn_workspace_bytes(int64_t rows, int64_t channels, const Queue& queue) {
  return workspace_bytes(rows, channels, std::max(sizeof(OctetMoments), sizeof(OctetSums<3>)),
                         queue);
}

// Calls launch.operator()<epilogue>().
template <typename Launch>
cudaError_t dispatch_epilogue(Epilogue epilogue, Launch launch) {
  switch (epilogue) {
    case Epilogue::none:
      return launch.template operator()<Epilogue::none>();
    case Epilogue::relu:
      return launch.template operator()<Epilogue::relu>();
    case Epilogue::add_relu:
      return launch.template operator()<Epilogue::add_relu>();
    case Epilogue::add_bn_relu:
      return launch.template operator()<Epilogue::add_bn_relu>();
  }
  return cudaErrorInvalidValue;
}

inline cudaError_t launch_bn_stats(const StatsParams& p, void* workspace, const Queue& queue) {
  return dispatch_layout(p.dtype, p.extent.channels, {p.x}, [&]<typename scalar_t, bool kPacked>() {
    return p.sums == nullptr
               ? launch_reduction(bn_stats_kernel<scalar_t, false, kPacked>, p, workspace, queue)
               : launch_reduction(bn_stats_kernel<scalar_t, true, kPacked>, p, workspace, queue);
  });
}

// One thread a channel.
inline cudaError_t launch_bn_scale(const ScaleParams& p, const Queue& queue) {
  const int64_t blocks = (p.channels + kPointwiseThreads - 1) / kPointwiseThreads;
  const Tiling tiling{dim3(static_cast<unsigned>(blocks)), dim3(kPointwiseThreads), 0};
  return launch_kernel(bn_scale_kernel, tiling, queue, p);
}

inline cudaError_t launch_bn_forward(const ForwardParams& p, const Queue& queue) {
  return dispatch_epilogue(p.epilogue, [&]<Epilogue kEpilogue>() {
    return dispatch_layout(p.dtype, p.extent.channels, {p.x, p.residual, p.out},
                           [&]<typename scalar_t, bool kPacked>() {
                             return launch_pointwise(
                                 bn_forward_kernel<scalar_t, kEpilogue, kPacked>, p, queue);
                           });
  });
}

// The second pass alone. What the first pass of add_relu leaves is what none begins with.
inline cudaError_t launch_bn_backward_apply(BackwardParams p, const Queue& queue) {
  if (p.epilogue == Epilogue::add_relu) {
    p.epilogue = Epilogue::none;
    p.grad = p.masked_grad;
  }
  return dispatch_epilogue(p.epilogue, [&]<Epilogue kEpilogue>() {
    if constexpr (kEpilogue == Epilogue::add_relu)
      return cudaErrorInvalidValue;
    else
      return dispatch_layout(
          p.dtype, p.extent.channels, {p.grad, p.masked_grad, p.x, p.residual, p.dx, p.dresidual},
          [&]<typename scalar_t, bool kPacked>() {
            return launch_pointwise(bn_backward_kernel<scalar_t, kEpilogue, kPacked>, p, queue);
          });
  });
}

inline cudaError_t launch_bn_backward(const BackwardParams& p, void* workspace,
                                      const Queue& queue) {
  const cudaError_t status = dispatch_epilogue(p.epilogue, [&]<Epilogue kEpilogue>() {
    return dispatch_layout(
        p.dtype, p.extent.channels, {p.grad, p.shortcut_grad, p.masked_grad, p.x, p.residual},
        [&]<typename scalar_t, bool kPacked>() {
          if constexpr (has_residual(kEpilogue))
            if (p.shortcut_grad != nullptr)
              return launch_reduction(bn_backward_reduce_kernel<scalar_t, kEpilogue, true, kPacked>,
                                      p, workspace, queue);
          return launch_reduction(bn_backward_reduce_kernel<scalar_t, kEpilogue, false, kPacked>, p,
                                  workspace, queue);
        });
  });
  return status == cudaSuccess ? launch_bn_backward_apply(p, queue) : status;
}

}  // namespace fastresnet::cuda
