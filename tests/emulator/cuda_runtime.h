// SPDX-License-Identifier: Apache-2.0
// Stands in for CUDA's header of this name when g++ compiles the kernels: the built-in variables,
// the device functions the kernels use, and launches that run them at once on the host. Types and
// the arithmetic of half and bfloat16 are the toolkit's own.
#pragma once

#include <cstring>
#include <source_location>
#include <utility>

#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include "emulator.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// One copy a block: the emulator runs all blocks on one thread of the host and exchanges that
// thread's thread-local memory when it goes from block to block.
#define __shared__ static thread_local

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

inline void __syncthreads(std::source_location site = std::source_location::current()) {
  emulator::barrier(site);
}
// Memory is sequentially consistent here, so a fence has nothing to do.
inline void __threadfence() {}

template <typename T>
T __ldg(const T* p) {
  emulator::access(p, sizeof(T), emulator::Access::load);
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return __ldg(p);
}
template <typename T>
void __stwb(T* p, T value) {
  emulator::access(p, sizeof(T), emulator::Access::store);
  *p = value;
}

inline unsigned atomicAdd(unsigned* p, unsigned value) {
  emulator::access(p, sizeof(unsigned), emulator::Access::store);
  const unsigned before = *p;
  *p = before + value;
  return before + emulator::faults().ticket_error;
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  struct Arguments {
    T value, result;
    int source;
  };
  const int source = emulator::lane() + static_cast<int>(delta);
  Arguments arguments{value, value, source};
  emulator::warp_collective(
      [](void* const* lanes) {
        for (int i = 0; i < 32; ++i) {
          auto* own = static_cast<Arguments*>(lanes[i]);
          if (own == nullptr || own->source > 31) continue;
          const auto* source = static_cast<const Arguments*>(lanes[own->source]);
          if (source == nullptr)
            emulator::fail("shuffle from lane %d, not in the mask", own->source);
          own->result = source->value;
        }
      },
      &arguments, mask);
  return arguments.result;
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  if (!emulator::faults().no_memset) std::memset(p, value, bytes);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulator::launch(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
