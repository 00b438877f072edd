// SPDX-License-Identifier: Apache-2.0
// Stands in for CUDA's header of this name when g++ compiles the kernels: the built-in variables,
// the device functions the kernels use, and launches that run them at once on the host. Types and
// the arithmetic of half and bfloat16 are the toolkit's own.
#pragma once

#include <algorithm>
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

// Where in the source a device function was called.
#define EMULATOR_SITE std::source_location site = std::source_location::current()

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

inline void __syncthreads(EMULATOR_SITE) { emulator::barrier(site); }
inline void __threadfence(EMULATOR_SITE) { emulator::fence(site); }

// ---- Global memory.

template <typename T>
T __ldg(const T* p, EMULATOR_SITE) {
  emulator::access(p, sizeof(T), emulator::Access::read_only_load, site);
  return *p;
}
template <typename T>
T __ldcg(const T* p, EMULATOR_SITE) {
  emulator::look(p);
  emulator::access(p, sizeof(T), emulator::Access::load, site);
  return *p;
}
template <typename T>
void __stwb(T* p, T value, EMULATOR_SITE) {
  emulator::access(p, sizeof(T), emulator::Access::store, site);
  emulator::store(p, &value, sizeof(T));
}

// Reads *p, stores update(*p) and returns what was read, all at once.
template <typename T, typename Update>
T emulated_atomic(T* p, Update update, const std::source_location& site) {
  emulator::look(p);
  emulator::access(p, sizeof(T), emulator::Access::store, site);
  const T before = *p;
  *p = update(before);
  return before;
}
template <typename T>
T atomicAdd(T* p, T value, EMULATOR_SITE) {
  const T before = emulated_atomic(p, [&](T old) { return old + value; }, site);
  return before + static_cast<T>(emulator::faults().ticket_error);
}
template <typename T>
T atomicMax(T* p, T value, EMULATOR_SITE) {
  return emulated_atomic(p, [&](T old) { return std::max(old, value); }, site);
}
template <typename T>
T atomicExch(T* p, T value, EMULATOR_SITE) {
  return emulated_atomic(p, [&](T) { return value; }, site);
}
template <typename T>
T atomicCAS(T* p, T expected, T value, EMULATOR_SITE) {
  return emulated_atomic(p, [&](T old) { return old == expected ? value : old; }, site);
}

// ---- Warps.

// The value of lane `source`, or the own one where there is no such lane.
template <typename T>
T emulated_shuffle(unsigned mask, T value, int source, const std::source_location& site) {
  struct Arguments {
    T value, result;
    int source;
  };
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
      &arguments, mask, site);
  return arguments.result;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, EMULATOR_SITE) {
  return emulated_shuffle(mask, value, source & 31, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, EMULATOR_SITE) {
  return emulated_shuffle(mask, value, emulator::lane() + static_cast<int>(delta), site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, EMULATOR_SITE) {
  return emulated_shuffle(mask, value, emulator::lane() ^ bits, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  struct Arguments {
    int predicate;
    unsigned result;
  };
  Arguments arguments{predicate, 0};
  emulator::warp_collective(
      [](void* const* lanes) {
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i)
          if (lanes[i] && static_cast<Arguments*>(lanes[i])->predicate) votes |= 1u << i;
        for (int i = 0; i < 32; ++i)
          if (lanes[i]) static_cast<Arguments*>(lanes[i])->result = votes;
      },
      &arguments, mask, site);
  return arguments.result;
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return __ballot_sync(mask, !predicate, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_SITE) {
  char nothing;
  emulator::warp_collective([](void* const*) {}, &nothing, mask, site);
}

// ---- The host's side.

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  if (emulator::may_set(p, bytes)) std::memset(p, value, bytes);
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > emulator::kLargestSharedLimit)
    return cudaErrorInvalidValue;
  emulator::dynamic_shared_limit(reinterpret_cast<const void*>(kernel)) = value;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulator::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                   emulator::dynamic_shared_limit(reinterpret_cast<const void*>(kernel)),
                   [&] { kernel(arguments...); });
  return cudaSuccess;
}
