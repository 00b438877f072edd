// SPDX-License-Identifier: Apache-2.0
// How kernels over [rows, channels] (channels_last) are laid out, and how they are launched. A
// block takes up to 64 channels and a range of rows; a thread takes one octet of channels and every
// blockDim.y-th of the rows, so what it knows of its channels stays in registers. Neighbouring
// threads read neighbouring 16 bytes.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

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

// Scratch memory, 16-byte aligned, that launch_reduction needs for sums of `acc_bytes` an octet.
inline int64_t workspace_bytes(int64_t rows, int64_t channels, size_t acc_bytes,
                               const Queue& queue) {
  const Tiling tiling = reduce_tiling({rows, channels, 0}, queue);
  const int64_t octets = int64_t{tiling.grid.x} * tiling.grid.y * tiling.block.x;
  return ticket_bytes(tiling) + octets * static_cast<int64_t>(acc_bytes);
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

}  // namespace fastresnet::cuda
