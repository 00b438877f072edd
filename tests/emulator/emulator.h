// SPDX-License-Identifier: Apache-2.0
// What emulated device code asks of the scheduler in emulator.cpp. Kernels never see this file:
// they include <cuda_runtime.h>, which is ours here and CUDA's under nvcc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

#include <vector_types.h>

#include "memory.h"

namespace emulator {

// Runs `body` once for every thread of every block. An error stops it; see emulator_error().
// `dynamic_bytes` of shared memory are asked for, `dynamic_limit` permitted for this kernel.
void launch(dim3 grid, dim3 block, size_t dynamic_bytes, size_t dynamic_limit,
            const std::function<void()>& body);

// Waits for every thread of the block.
void barrier(const std::source_location& site);

// Waits for every lane in `mask`, then one of them calls perform with the 32 pointers that the
// lanes handed in, null for a lane outside the mask. The results go into what they point to.
using Collective = void (*)(void* const* lanes);
void warp_collective(Collective perform, void* arguments, unsigned mask,
                     const std::source_location& site);
int lane();

// Every access to global memory: counted, and an error where it is misaligned, outside memory that
// the test declared, or read-only where this launch has written. Before a store, other threads may
// overtake this one.
void access(const volatile void* address, size_t bytes, Access kind,
            const std::source_location& site);
// A store that other blocks see no sooner than a fence of its block, or the block's end.
void store(void* address, const void* value, size_t bytes);
void fence(const std::source_location& site);
// Whether the host may set that memory between launches; an error where not.
bool may_set(const void* address, size_t bytes);
// A look at what other threads may change. Who looks at one address again and again lets them run;
// if that never ends, it is a livelock.
void look(const volatile void* address);

// The block's dynamic shared memory.
void* dynamic_shared();
constexpr size_t kSharedLimit = 48 * 1024;          // of every kernel
constexpr size_t kLargestSharedLimit = 227 * 1024;  // of one that asks for it, on sm_90 and sm_100
// What cudaFuncSetAttribute allowed a kernel, kSharedLimit at first.
size_t& dynamic_shared_limit(const void* kernel);

// A copy to shared memory that is performed when it is waited for, and not before.
void copy_later(void* shared, const void* global, size_t bytes);
void close_copy_group();
void wait_for_copies(int groups_left);

// What is to go wrong in the next launches, so that a test can see that it notices.
struct Faults {
  bool no_memset = false;
  int ticket_error = 0;  // added to what atomicAdd returns
};
Faults& faults();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulator
