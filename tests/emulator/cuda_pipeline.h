// SPDX-License-Identifier: Apache-2.0
// Stands in for CUDA's header of this name: copies from global to shared memory that run while the
// thread goes on (cp.async). Here they run when the thread waits for them, so that reading too
// early is always a mistake and not only sometimes.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes, EMULATOR_SITE) {
  if (bytes != 4 && bytes != 8 && bytes != 16) emulator::fail("copy of %zu bytes", bytes);
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0)
    emulator::fail("misaligned copy to shared memory of %zu bytes", bytes);
  emulator::access(global, bytes, emulator::Access::load, site);
  emulator::copy_later(shared, global, bytes);
}
inline void __pipeline_commit() { emulator::close_copy_group(); }
inline void __pipeline_wait_prior(int groups_left) { emulator::wait_for_copies(groups_left); }
