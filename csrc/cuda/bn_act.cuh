// SPDX-License-Identifier: Apache-2.0
// Batch norm with its epilogue over [rows, channels] (channels_last): statistics, forward and
// backward as CUDA kernels, and the functions that launch them. Plain pointers, no torch types: the
// tensors are in bn_act.cu, and tests/emulator runs this same file on the host.
//
// Every kernel is laid out alike. A block takes up to 64 channels and a range of rows; a thread
// takes one octet of channels and every blockDim.y-th of the rows, so the coefficients of its
// channels stay in registers. Neighbouring threads read neighbouring 16 bytes.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "batch_norm.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "params.h"

namespace fastresnet::cuda {

constexpr int kBlockChannels = kBlockOctets * kOctet;
constexpr int kPointwiseThreads = 256;
// Threads that a multiprocessor must be able to hold: enough for the loads in flight, few enough
// that the compiler may take 128 registers before it spills.
constexpr int kResidentThreads = 512;

struct Extent {
  int64_t rows, channels;
  int64_t rows_per_block;  // set by the launch
};

// One batch norm's vectors, [channels] each. Backward passes leave bias null unless they need it.
struct Normalisation {
  const float* mean;
  const float* var;
  const float* weight;
  const float* bias;
  float eps;

  __device__ __forceinline__ Affine<float> affine(int64_t c) const {
    return normalise(__ldg(mean + c), __ldg(var + c), __ldg(weight + c), __ldg(bias + c), eps);
  }
};

struct StatsParams {
  const void* x;  // [rows, channels]
  float* mean;    // [channels]
  float* var;     // [channels], biased
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

struct BackwardParams {
  const void* grad;             // [rows, channels]
  const uint8_t* mask;          // [rows, mask_bytes(channels)], for add_relu and add_bn_relu
  const void* x;                // [rows, channels]
  Normalisation norm;           // bias for relu only: its mask is computed again
  const void* residual;         // [rows, channels], for add_bn_relu
  Normalisation residual_norm;  // for add_bn_relu
  void* dx;                     // [rows, channels]
  void* dresidual;              // [rows, channels], for add_relu and add_bn_relu
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

// ---- What a thread works on.

struct Tile {
  int64_t channels;
  int64_t channel;  // the first of this thread's octet
  int valid;        // how many channels of the octet exist
  int64_t row, end;
  int step;

  __device__ __forceinline__ explicit Tile(const Extent& e) {
    channels = e.channels;
    channel = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kOctet;
    const int64_t left = channels - channel;
    valid = left < 0 ? 0 : left < kOctet ? static_cast<int>(left) : kOctet;
    const int64_t first = blockIdx.y * e.rows_per_block;
    end = first + e.rows_per_block < e.rows ? first + e.rows_per_block : e.rows;
    row = valid == 0 ? end : first + threadIdx.y;
    step = blockDim.y;
  }

  __device__ __forceinline__ int64_t value_at(int64_t r) const { return r * channels + channel; }
  __device__ __forceinline__ int64_t mask_at(int64_t r) const {
    return r * mask_bytes(channels) + channel / kOctet;
  }
};

// Calls body(first row, number of rows as a constant): kRows at a time, tile.step apart, so that
// their loads are in flight together, then one by one. Unpacked rows have eight loads each already.
template <int kRows, typename Body>
__device__ __forceinline__ void for_rows(const Tile& tile, Body body) {
  int64_t row = tile.row;
  for (; row + (kRows - 1) * tile.step < tile.end; row += kRows * tile.step)
    body(row, std::integral_constant<int, kRows>{});
  for (; row < tile.end; row += tile.step) body(row, std::integral_constant<int, 1>{});
}

// Computes value(c) once for each channel of the block and hands every thread those of its octet;
// zeros where there is no channel. `shared` has kBlockChannels entries.
template <typename value_t, typename Compute>
__device__ __forceinline__ void share_channels(const Tile& tile, value_t* shared,
                                               value_t (&own)[kOctet], Compute compute) {
  const int local = threadIdx.x * kOctet;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  if (thread < static_cast<int>(blockDim.x) * kOctet) {
    const int64_t c = tile.channel - local + thread;
    shared[thread] = c < tile.channels ? compute(c) : value_t{};
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kOctet; ++i) own[i] = shared[local + i];
}

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

template <typename scalar_t, bool kPacked>
__global__ void __launch_bounds__(kReduceThreads, kResidentThreads / kReduceThreads)
    bn_stats_kernel(StatsParams p, Partials<OctetMoments> partials, unsigned* tickets) {
  const auto* x = static_cast<const scalar_t*>(p.x);
  const Tile tile(p.extent);

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

// ---- Forward.

// As torch's ReLU: NaN passes.
__device__ __forceinline__ bool relu_passes(float z) { return !(z <= 0.0f); }

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

// What both passes read of one row: the gradient, what masks it, and what it is multiplied with.
template <typename scalar_t, Epilogue kEpilogue, bool kPacked>
struct BackwardRow {
  Octet<scalar_t, kPacked> grad, x, residual;
  unsigned mask;

  __device__ __forceinline__ void load(const BackwardParams& p, const Tile& tile, int64_t row) {
    const int64_t at = tile.value_at(row);
    grad.load(static_cast<const scalar_t*>(p.grad) + at, tile.valid);
    x.load(static_cast<const scalar_t*>(p.x) + at, tile.valid);
    if constexpr (kEpilogue == Epilogue::add_bn_relu)
      residual.load(static_cast<const scalar_t*>(p.residual) + at, tile.valid);
    if constexpr (has_residual(kEpilogue)) mask = __ldg(p.mask + tile.mask_at(row));
  }

  // x and the gradient behind the activation. `affine` is the forward's, for relu.
  __device__ __forceinline__ void widen(const Affine<float> (&affine)[kOctet],
                                        float (&value)[kOctet], float (&g)[kOctet]) const {
    x.widen(value);
    grad.widen(g);
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

template <int kSums>
struct alignas(16) OctetSums {
  float sum[kSums][kOctet];

  __device__ __forceinline__ void merge(const OctetSums& other) {
#pragma unroll
    for (int s = 0; s < kSums; ++s)
#pragma unroll
      for (int i = 0; i < kOctet; ++i) sum[s][i] += other.sum[s][i];
  }
};

// Sums of g, of g * (x - mean) and, for add_bn_relu, of g * (residual - residual_mean).
template <Epilogue kEpilogue>
using BackwardSums = OctetSums<kEpilogue == Epilogue::add_bn_relu ? 3 : 2>;

template <typename scalar_t, Epilogue kEpilogue, bool kPacked>
__global__ void __launch_bounds__(kReduceThreads, kResidentThreads / kReduceThreads)
    bn_backward_reduce_kernel(BackwardParams p, Partials<BackwardSums<kEpilogue>> partials,
                              unsigned* tickets) {
  constexpr bool kDual = kEpilogue == Epilogue::add_bn_relu;
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
    BackwardRow<scalar_t, kEpilogue, kPacked> loaded[rows];
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
    }
  });

  if (!reduce_grid(sums, partials, tickets)) return;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (i >= tile.valid) continue;
    const int64_t c = tile.channel + i;
    store_global(p.dbias + c, sums.sum[0][i]);
    store_global(p.sum_gx + c, sums.sum[1][i]);
    store_global(p.dweight + c, weight_gradient(sums.sum[1][i], __ldg(p.norm.var + c), p.norm.eps));
    if constexpr (kDual) {
      const float var = __ldg(p.residual_norm.var + c);
      store_global(p.sum_gr + c, sums.sum[2][i]);
      store_global(p.dresidual_weight + c,
                   weight_gradient(sums.sum[2][i], var, p.residual_norm.eps));
    }
  }
}

// dx of one channel, from the gradient behind the activation and x.
struct alignas(16) ChannelGradient {
  InputGradient<float> of;
  float mean;

  __device__ __forceinline__ float operator()(float g, float x) const {
    return of.scale * fmaf(-of.slope, x - mean, g - of.offset);
  }
};

__device__ __forceinline__ ChannelGradient channel_gradient(const BackwardParams& p,
                                                            const Normalisation& norm,
                                                            const float* sum_gx, int64_t c) {
  const auto count = static_cast<float>(p.extent.rows);
  return {input_gradient(__ldg(p.dbias + c), __ldg(sum_gx + c), count, __ldg(norm.var + c),
                         __ldg(norm.weight + c), norm.eps, p.training),
          __ldg(norm.mean + c)};
}

template <typename scalar_t, Epilogue kEpilogue, bool kPacked>
__global__ void __launch_bounds__(kPointwiseThreads, kResidentThreads / kPointwiseThreads)
    bn_backward_kernel(BackwardParams p) {
  constexpr bool kDual = kEpilogue == Epilogue::add_bn_relu;
  auto* dx = static_cast<scalar_t*>(p.dx);
  auto* dresidual = static_cast<scalar_t*>(p.dresidual);
  const Tile tile(p.extent);

  __shared__ ChannelGradient shared[2][kBlockChannels];
  ChannelGradient to_dx[kOctet], to_dresidual[kOctet];
  share_channels(tile, shared[0], to_dx,
                 [&](int64_t c) { return channel_gradient(p, p.norm, p.sum_gx, c); });
  if constexpr (kDual)
    share_channels(tile, shared[1], to_dresidual,
                   [&](int64_t c) { return channel_gradient(p, p.residual_norm, p.sum_gr, c); });
  Affine<float> affine[kOctet];
  if constexpr (kEpilogue == Epilogue::relu) {
    __shared__ Affine<float> shared_affine[kBlockChannels];
    share_channels(tile, shared_affine, affine, [&](int64_t c) { return p.norm.affine(c); });
  }

  // With two coefficient sets in registers there is no room for a second row of three octets.
  for_rows<kPacked && !kDual ? 2 : 1>(tile, [&](int64_t row, auto rows) {
    BackwardRow<scalar_t, kEpilogue, kPacked> loaded[rows];
#pragma unroll
    for (int k = 0; k < rows; ++k) loaded[k].load(p, tile, row + k * tile.step);
#pragma unroll
    for (int k = 0; k < rows; ++k) {
      const int64_t at = tile.value_at(row + k * tile.step);
      float x[kOctet], g[kOctet];
      [[maybe_unused]] float r[kOctet];
      loaded[k].widen(affine, x, g);
      if constexpr (kDual) loaded[k].residual.widen(r);
      Octet<scalar_t, kPacked> result;
      if constexpr (has_residual(kEpilogue)) {
#pragma unroll
        for (int i = 0; i < kOctet; ++i) {
          if constexpr (kDual)
            r[i] = to_dresidual[i](g[i], r[i]);
          else
            r[i] = g[i];
        }
        result.narrow(r);
        result.store(dresidual + at, tile.valid);
      }
#pragma unroll
      for (int i = 0; i < kOctet; ++i) x[i] = to_dx[i](g[i], x[i]);
      result.narrow(x);
      result.store(dx + at, tile.valid);
    }
  });
}

// ---- Launches. They return the CUDA error of the first call that failed.

struct Queue {
  cudaStream_t stream;
  int multiprocessors;
};

struct Tiling {
  dim3 grid, block;
  int64_t rows_per_block;
};

// About `blocks_per_multiprocessor` blocks for each, of at least `rows_in_flight` rows a thread.
inline Tiling make_tiling(const Extent& e, int threads, int blocks_per_multiprocessor,
                          int rows_in_flight, int multiprocessors) {
  const int64_t octets = mask_bytes(e.channels);
  unsigned width = kBlockOctets;
  while (width > 1 && width / 2 >= octets) width /= 2;
  const unsigned height = threads / width;
  const int64_t columns = (octets + width - 1) / width;
  const int64_t wanted = int64_t{multiprocessors} * blocks_per_multiprocessor / columns;
  const int64_t useful = e.rows / (int64_t{height} * rows_in_flight);
  const int64_t splits = std::clamp<int64_t>(std::min(wanted, useful), 1, 65535);
  const int64_t rows_per_block = (e.rows + splits - 1) / splits;
  const int64_t used = (e.rows + rows_per_block - 1) / rows_per_block;
  return {dim3(static_cast<unsigned>(columns), static_cast<unsigned>(used)), dim3(width, height),
          rows_per_block};
}

inline Tiling reduce_tiling(const Extent& e, const Queue& queue) {
  return make_tiling(e, kReduceThreads, 2, 4, queue.multiprocessors);
}

inline Tiling pointwise_tiling(const Extent& e, const Queue& queue) {
  return make_tiling(e, kPointwiseThreads, 8, 2, queue.multiprocessors);
}

// Tickets, one a column of blocks, then the partial sums of all blocks.
inline int64_t ticket_bytes(const Tiling& tiling) { return (int64_t{tiling.grid.x} + 3) / 4 * 16; }

// Scratch memory, 16-byte aligned, that launch_bn_stats and launch_bn_backward need.
inline int64_t workspace_bytes(int64_t rows, int64_t channels, const Queue& queue) {
  constexpr int64_t kLargest = std::max(sizeof(OctetMoments), sizeof(OctetSums<3>));
  const Tiling tiling = reduce_tiling({rows, channels, 0}, queue);
  const int64_t octets = int64_t{tiling.grid.x} * tiling.grid.y * tiling.block.x;
  return ticket_bytes(tiling) + octets * kLargest;
}

// Whether rows of `channels` values at these addresses (null ones aside) are whole 16-byte words.
template <typename scalar_t>
bool is_packed(int64_t channels, std::initializer_list<const void*> pointers) {
  if (channels * sizeof(scalar_t) % 16 != 0) return false;
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

// Calls launch.operator()<scalar_t, kPacked>().
template <typename Launch>
cudaError_t dispatch_layout(DType dtype, int64_t channels,
                            std::initializer_list<const void*> pointers, Launch launch) {
  const auto of_type = [&]<typename scalar_t>() {
    return is_packed<scalar_t>(channels, pointers) ? launch.template operator()<scalar_t, true>()
                                                   : launch.template operator()<scalar_t, false>();
  };
  switch (dtype) {
    case DType::float32:
      return of_type.template operator()<float>();
    case DType::bfloat16:
      return of_type.template operator()<__nv_bfloat16>();
    case DType::float16:
      return of_type.template operator()<__half>();
  }
  return cudaErrorInvalidValue;
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

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const Tiling& tiling, const Queue& queue,
                          const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = tiling.grid;
  config.blockDim = tiling.block;
  config.stream = queue.stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// A kernel that ends in reduce_grid, with its tickets set to zero.
template <typename params_t, typename acc_t>
cudaError_t launch_reduction(void (*kernel)(params_t, Partials<acc_t>, unsigned*), params_t p,
                             void* workspace, const Queue& queue) {
  const Tiling tiling = reduce_tiling(p.extent, queue);
  p.extent.rows_per_block = tiling.rows_per_block;
  auto* tickets = static_cast<unsigned*>(workspace);
  const cudaError_t status =
      cudaMemsetAsync(tickets, 0, sizeof(unsigned) * tiling.grid.x, queue.stream);
  if (status != cudaSuccess) return status;
  auto* quads = reinterpret_cast<float4*>(static_cast<char*>(workspace) + ticket_bytes(tiling));
  return launch_kernel(kernel, tiling, queue, p, Partials<acc_t>{quads}, tickets);
}

template <typename params_t>
cudaError_t launch_pointwise(void (*kernel)(params_t), params_t p, const Queue& queue) {
  const Tiling tiling = pointwise_tiling(p.extent, queue);
  p.extent.rows_per_block = tiling.rows_per_block;
  return launch_kernel(kernel, tiling, queue, p);
}

inline cudaError_t launch_bn_stats(const StatsParams& p, void* workspace, const Queue& queue) {
  return dispatch_layout(p.dtype, p.extent.channels, {p.x}, [&]<typename scalar_t, bool kPacked>() {
    return launch_reduction(bn_stats_kernel<scalar_t, kPacked>, p, workspace, queue);
  });
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

inline cudaError_t launch_bn_backward(const BackwardParams& p, void* workspace,
                                      const Queue& queue) {
  return dispatch_epilogue(p.epilogue, [&]<Epilogue kEpilogue>() {
    return dispatch_layout(
        p.dtype, p.extent.channels, {p.grad, p.x, p.residual, p.dx, p.dresidual},
        [&]<typename scalar_t, bool kPacked>() {
          const cudaError_t status = launch_reduction(
              bn_backward_reduce_kernel<scalar_t, kEpilogue, kPacked>, p, workspace, queue);
          if (status != cudaSuccess) return status;
          return launch_pointwise(bn_backward_kernel<scalar_t, kEpilogue, kPacked>, p, queue);
        });
  });
}

}  // namespace fastresnet::cuda
