// SPDX-License-Identifier: Apache-2.0
// What emulated device code asks of the scheduler in emulator.cpp. Kernels never see this file:
// they include <cuda_runtime.h>, which is ours here and CUDA's under nvcc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

#include <vector_types.h>

namespace emulator {

// Runs `body` once for every thread of every block. An error stops it; see emulator_error().
void launch(dim3 grid, dim3 block, const std::function<void()>& body);

// Waits for every thread of the block.
void barrier(const std::source_location& site);

// Waits for every lane in `mask`, then one of them calls perform with the 32 pointers that the
// lanes handed in, null for a lane outside the mask. The results go into what they point to.
using Collective = void (*)(void* const* lanes);
void warp_collective(Collective perform, void* arguments, unsigned mask);
int lane();

enum class Access { load, store };
// Every access to global memory: counted, and an error where it is misaligned or outside memory
// that the test declared. Before a store, other threads may overtake this one.
void access(const volatile void* address, size_t bytes, Access kind);

// What is to go wrong in the next launches, so that a test can see that it notices.
struct Faults {
  bool no_memset = false;
  int ticket_error = 0;  // added to what atomicAdd returns
};
Faults& faults();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulator
