// SPDX-License-Identifier: Apache-2.0
// Kernels with one mistake each, which the emulator must notice: the test of the tests. They are
// wrong on purpose and are never compiled for a device.
#include <iterator>

#include "cuda_runtime.h"

namespace {

struct Case {
  const char* name;
  dim3 grid;
  void (*kernel)(float* out, unsigned* ticket);
};

__device__ void sum_of_block(float* out, bool wait) {
  __shared__ float values[64];
  values[threadIdx.x] = 1.0f;
  if (wait) __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0.0f;
  for (float value : values) sum += value;
  __stwb(out + blockIdx.y, sum);
}

void correct(float* out, unsigned*) { sum_of_block(out, true); }
void missing_barrier(float* out, unsigned*) { sum_of_block(out, false); }

void outside(float* out, unsigned*) { __stwb(out + 4 + threadIdx.x, 1.0f); }
void before(float* out, unsigned*) { __ldg(out - 1); }
void misaligned(float* out, unsigned*) { __ldg(reinterpret_cast<float4*>(out + 1)); }

void exit_before_barrier(float*, unsigned*) {
  if (threadIdx.x == 7) return;
  __syncthreads();
}
void two_barriers(float*, unsigned*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
void barrier_against_shuffle(float*, unsigned*) {
  if (threadIdx.x % 32 == 0) __syncthreads();
  __shfl_down_sync(0xffffffffu, 1.0f, 1);
}
void exit_before_shuffle(float*, unsigned*) {
  if (threadIdx.x == 7) return;
  __shfl_down_sync(0xffffffffu, 1.0f, 1);
}
void shuffle_outside_mask(float*, unsigned*) {
  if (threadIdx.x % 32 < 16) __shfl_down_sync(0x0000ffffu, 1.0f, 16);
}

// Each block leaves a value, the last adds them up. The ticket is taken by a thread that does not
// wait for the one that stores.
void ticket_without_barrier(float* out, unsigned* ticket) {
  __shared__ bool last;
  if (threadIdx.x == 1) __stwb(out + blockIdx.y, 1.0f);
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == gridDim.y - 1;
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  float sum = 0.0f;
  for (unsigned i = 0; i < gridDim.y; ++i) sum += __ldcg(out + i);
  __stwb(out, sum);
}

constexpr Case kCases[] = {
    {"correct", dim3(1, 4), correct},
    {"missing_barrier", dim3(1, 4), missing_barrier},
    {"outside", dim3(1), outside},
    {"before", dim3(1), before},
    {"misaligned", dim3(1), misaligned},
    {"exit_before_barrier", dim3(1), exit_before_barrier},
    {"two_barriers", dim3(1), two_barriers},
    {"barrier_against_shuffle", dim3(1), barrier_against_shuffle},
    {"exit_before_shuffle", dim3(1), exit_before_shuffle},
    {"shuffle_outside_mask", dim3(1), shuffle_outside_mask},
    {"ticket_without_barrier", dim3(1, 4), ticket_without_barrier},
    {"empty_grid", dim3(0), correct},
};

}  // namespace

extern "C" {

const char* planted_name(int index) {
  return index < static_cast<int>(std::size(kCases)) ? kCases[index].name : nullptr;
}

// Blocks of 64 threads. `out` holds 4 floats.
void planted_run(int index, float* out, unsigned* ticket) {
  cudaLaunchConfig_t config{};
  config.gridDim = kCases[index].grid;
  config.blockDim = dim3(64);
  cudaLaunchKernelEx(&config, kCases[index].kernel, out, ticket);
}
}
