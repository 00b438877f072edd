// SPDX-License-Identifier: Apache-2.0
// Sums over rows in one launch: threads, then warps, then blocks, in a fixed order. The last block
// of a column to finish, known by its ticket, adds up what the others left in memory; no float is
// ever added atomically, so the result depends on the grid alone and not on who came first.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/vec.cuh"

namespace fastresnet::cuda {

constexpr int kWarp = 32;
// Octets side by side in a block: 64 channels, 128 bytes of 16-bit values, one cache line. Wider
// blocks would leave fewer of them to finish a reduction side by side.
constexpr int kBlockOctets = 8;
constexpr int kReduceThreads = 512;

// An accumulator `acc_t` holds the sums of one octet of channels: a trivial struct of floats, whole
// multiples of 16 bytes, zero where it holds nothing, with merge(const acc_t&).

template <typename acc_t>
__device__ __forceinline__ acc_t shuffle_down(const acc_t& acc, int offset) {
  float words[sizeof(acc_t) / sizeof(float)];
  memcpy(words, &acc, sizeof(acc_t));
#pragma unroll
  for (float& word : words) word = __shfl_down_sync(0xffffffffu, word, offset);
  acc_t other;
  memcpy(&other, words, sizeof(acc_t));
  return other;
}

// The block is blockDim.x octets (a power of two) by blockDim.y rows; afterwards the threads of row
// 0 hold the sum over all rows.
template <typename acc_t>
__device__ __forceinline__ void reduce_block(acc_t& acc) {
  constexpr int kWarps = kReduceThreads / kWarp;
  __shared__ acc_t partial[kWarps][kBlockOctets];

  for (int offset = kWarp / 2; offset >= static_cast<int>(blockDim.x); offset /= 2)
    acc.merge(shuffle_down(acc, offset));

  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int warp = thread / kWarp, lane = thread % kWarp;
  const bool holds_sum = lane < static_cast<int>(blockDim.x);
  // Each halving writes slots of its own, so one barrier a step is enough.
  for (int half = kWarps / 2; half > 0; half /= 2) {
    if (holds_sum && warp >= half && warp < 2 * half) partial[warp][lane] = acc;
    __syncthreads();
    if (holds_sum && warp < half) acc.merge(partial[warp + half][lane]);
  }
}

// What blocks leave for one another: [gridDim.y][gridDim.x][sizeof(acc_t) / 16][blockDim.x] of 16
// bytes, so that neighbouring threads touch neighbouring addresses.
template <typename acc_t>
struct Partials {
  static constexpr int kQuads = sizeof(acc_t) / sizeof(float4);
  static_assert(sizeof(acc_t) % sizeof(float4) == 0);

  float4* quads;

  __device__ __forceinline__ float4* at(unsigned split) const {
    const int64_t block = static_cast<int64_t>(split) * gridDim.x + blockIdx.x;
    return quads + block * kQuads * blockDim.x + threadIdx.x;
  }

  __device__ __forceinline__ void store(const acc_t& acc) const {
    float4 words[kQuads];
    memcpy(words, &acc, sizeof(acc_t));
    float4* p = at(blockIdx.y);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) store_global(p + i * blockDim.x, words[i]);
  }

  // Past the first-level cache: another block wrote it in this launch.
  __device__ __forceinline__ acc_t load(unsigned split) const {
    float4 words[kQuads];
    const float4* p = at(split);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) words[i] = __ldcg(p + i * blockDim.x);
    acc_t acc;
    memcpy(&acc, words, sizeof(acc_t));
    return acc;
  }
};

// Whether every other block of this column has taken its ticket before, all its stores visible.
__device__ __forceinline__ bool is_last_block(unsigned* ticket) {
  __shared__ bool last;
  __threadfence();  // this thread's stores, before the ticket
  __syncthreads();  // and those of the whole block
  if (threadIdx.x == 0 && threadIdx.y == 0) last = atomicAdd(ticket, 1u) == gridDim.y - 1;
  __syncthreads();
  __threadfence();  // the others' stores, after the ticket
  return last;
}

// Sums acc over the blocks of a column (one blockIdx.x). True in the threads that hold the total:
// row 0 of the last block. `tickets` are [gridDim.x] zeros.
template <typename acc_t>
__device__ __forceinline__ bool reduce_grid(acc_t& acc, Partials<acc_t> partials,
                                            unsigned* tickets) {
  reduce_block(acc);
  if (threadIdx.y == 0) partials.store(acc);
  if (!is_last_block(tickets + blockIdx.x)) return false;
  acc = acc_t{};
  for (unsigned split = threadIdx.y; split < gridDim.y; split += blockDim.y)
    acc.merge(partials.load(split));
  reduce_block(acc);
  return threadIdx.y == 0;
}

}  // namespace fastresnet::cuda
