// SPDX-License-Identifier: Apache-2.0
// Kernels with one mistake each, which the emulator must notice: the test of the tests. They are
// wrong on purpose and are never compiled for a device.
#include <iterator>

#include "cuda_pipeline.h"
#include "cuda_runtime.h"

namespace {

struct Case {
  const char* name;
  dim3 grid;
  void (*kernel)(float* out, unsigned* ticket);
  size_t dynamic_bytes = 0;
  int permitted_bytes = 0;  // of dynamic shared memory, where it asks for more than is usual
  dim3 block = dim3(64);
  size_t cleared_bytes = 0;  // of `out`, before
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

void read_only_of_written(float* out, unsigned*) {
  if (threadIdx.x == 0) __stwb(out, 64.0f);
  __syncthreads();
  if (threadIdx.x == 1) __stwb(out + 1, __ldg(out));
}

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

// Each block leaves a value, the last adds them up. One thread stores, another takes the ticket.
enum class Fence { none, of_storing, of_other, of_other_behind_barrier };

__device__ void sum_by_ticket(float* out, unsigned* ticket, Fence fence, bool wait = true) {
  __shared__ bool last;
  if (threadIdx.x == 1) {
    __stwb(out + blockIdx.y, 16.0f);
    if (fence == Fence::of_storing) __threadfence();
  }
  if (threadIdx.x == 0 && fence == Fence::of_other) __threadfence();
  if (wait) __syncthreads();
  if (threadIdx.x == 0) {
    if (fence == Fence::of_other_behind_barrier) __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.y - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  __threadfence();
  float sum = 0.0f;
  for (unsigned i = 0; i < gridDim.y; ++i) sum += __ldcg(out + i);
  __stwb(out, sum);
}
void ticket(float* out, unsigned* t) { sum_by_ticket(out, t, Fence::of_storing); }
// The fence of a thread that has met the others at a barrier is for their stores, too.
void ticket_with_fence_behind_barrier(float* out, unsigned* t) {
  sum_by_ticket(out, t, Fence::of_other_behind_barrier);
}
void ticket_without_barrier(float* out, unsigned* t) {
  sum_by_ticket(out, t, Fence::of_storing, false);
}
void ticket_without_fence(float* out, unsigned* t) { sum_by_ticket(out, t, Fence::none); }
void ticket_with_fence_of_another(float* out, unsigned* t) {
  sum_by_ticket(out, t, Fence::of_other);
}

// ---- Atomics, and waiting for other blocks.

// out[0] = 64: one for each thread of the block that comes last.
void count_atomically(float* out, unsigned*) {
  if (threadIdx.x == 0) atomicExch(out, 0.0f);
  __syncthreads();
  atomicAdd(out, 1.0f);
}
void lost_update(float* out, unsigned*) {
  if (threadIdx.x == 0) __stwb(out, 0.0f);
  __syncthreads();
  __stwb(out, __ldcg(out) + 1.0f);
}

// Every block adds its share to what is behind a lock.
void locked(float* out, unsigned* lock, bool unlock, bool fence = true) {
  if (threadIdx.x != 0) return;
  while (atomicCAS(lock, 0u, 1u) != 0u) {
  }
  const float sum = __ldcg(out);
  __stwb(out, (sum == sum ? sum : 0.0f) + 16.0f);
  if (fence) __threadfence();
  if (unlock) atomicExch(lock, 0u);
}
void lock(float* out, unsigned* ticket) { locked(out, ticket, true); }
void lock_never_released(float* out, unsigned* ticket) { locked(out, ticket, false); }
void lock_without_fence(float* out, unsigned* ticket) { locked(out, ticket, true, false); }

// A barrier of the whole grid. It needs all blocks to be resident at once.
void wait_for_the_grid(float* out, unsigned* ticket) {
  if (threadIdx.x != 0) return;
  __stwb(out + blockIdx.y, 16.0f);
  __threadfence();
  atomicAdd(ticket, 1u);
  while (__ldcg(ticket) < gridDim.y) {
  }
  if (blockIdx.y != 0) return;
  float sum = 0.0f;
  for (unsigned i = 0; i < gridDim.y; ++i) sum += __ldcg(out + i);
  __stwb(out, sum);
}
void wait_for_a_block_too_many(float*, unsigned* ticket) {
  if (threadIdx.x != 0) return;
  atomicAdd(ticket, 1u);
  while (__ldcg(ticket) <= gridDim.y) {
  }
}

// ---- Votes.

void vote(float* out, unsigned*) {
  const unsigned odd = __ballot_sync(0xffffffffu, threadIdx.x & 1);
  const bool right = odd == 0xaaaaaaaau &&
                     __any_sync(0xffffffffu, threadIdx.x == 40) == (threadIdx.x >= 32) &&
                     __all_sync(0xffffffffu, threadIdx.x < 32) == (threadIdx.x < 32) &&
                     __shfl_xor_sync(0xffffffffu, threadIdx.x, 3) == (threadIdx.x ^ 3) &&
                     __shfl_sync(0xffffffffu, threadIdx.x % 32, 9) == 9;
  __syncwarp();
  __stwb(out + threadIdx.x / 32, right ? 64.0f : 0.0f);
}
void vote_of_a_branch(float*, unsigned*) {
  if (threadIdx.x % 2 == 0) __ballot_sync(0xffffffffu, 1);
  __syncthreads();
}
void vote_against_shuffle(float*, unsigned*) {
  if (threadIdx.x % 2 == 0)
    __ballot_sync(0xffffffffu, 1);
  else
    __shfl_xor_sync(0xffffffffu, 1, 1);
}

void two_shuffles(float*, unsigned*) {
  if (threadIdx.x % 2 == 0)
    __shfl_xor_sync(0xffffffffu, 1, 1);
  else
    __shfl_xor_sync(0xffffffffu, 1, 1);
}

// ---- Dynamic shared memory, and how much there may be.

void sum_of_dynamic(float* out, unsigned*) {
  auto* values = static_cast<float*>(emulator::dynamic_shared());
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0.0f;
  for (int i = 0; i < 64; ++i) sum += values[i];
  __stwb(out, sum);
}
void large_static(float* out, unsigned*) {
  __shared__ float values[49 * 256];
  for (unsigned i = threadIdx.x; i < std::size(values); i += blockDim.x) values[i] = 0.0f;
  __syncthreads();
  if (threadIdx.x == 0) __stwb(out, values[0] + 64.0f);
}

// ---- What only a build with sanitizers notices.

void past_dynamic(float* out, unsigned*) {
  auto* values = static_cast<volatile float*>(emulator::dynamic_shared());
  values[threadIdx.x + 4] = 1.0f;
  __stwb(out, 64.0f);
}
void past_static(float* out, unsigned*) {
  __shared__ float values[64];
  const volatile unsigned next = threadIdx.x + 1;
  values[next] = 64.0f;
  __stwb(out, values[1]);
}
void overflow(float* out, unsigned*) {
  const volatile int large = 0x7fffffff;
  __stwb(out, large + static_cast<int>(threadIdx.x) ? 64.0f : 0.0f);
}

// ---- Copies that run while the thread goes on.

enum class CopyMistake { none, no_wait, one_group_too_few, no_barrier, never_waits };

// Shared memory gets out[0..3] in two groups of copies; each thread reads what another has copied.
__device__ void copy(float* out, CopyMistake mistake) {
  alignas(16) __shared__ float values[64];
  if (threadIdx.x < 4) __stwb(out + threadIdx.x, 16.0f);
  __syncthreads();
  if (threadIdx.x < 2) __pipeline_memcpy_async(values + threadIdx.x, out + threadIdx.x, 4);
  __pipeline_commit();
  if (threadIdx.x < 2) __pipeline_memcpy_async(values + 2 + threadIdx.x, out + threadIdx.x, 4);
  __pipeline_commit();
  if (mistake == CopyMistake::never_waits) return;
  if (mistake != CopyMistake::no_wait)
    __pipeline_wait_prior(mistake == CopyMistake::one_group_too_few ? 1 : 0);
  if (mistake != CopyMistake::no_barrier) __syncthreads();
  const float sum = values[0] + values[1] + values[2] + values[3];
  __pipeline_wait_prior(0);
  __syncthreads();
  if (threadIdx.x == 63) __stwb(out, sum);
}
void copy_and_wait(float* out, unsigned*) { copy(out, CopyMistake::none); }
void copy_without_wait(float* out, unsigned*) { copy(out, CopyMistake::no_wait); }
void copy_waits_too_little(float* out, unsigned*) { copy(out, CopyMistake::one_group_too_few); }
void copy_without_barrier(float* out, unsigned*) { copy(out, CopyMistake::no_barrier); }
void copy_never_waited_for(float* out, unsigned*) { copy(out, CopyMistake::never_waits); }
void misaligned_copy(float* out, unsigned*) {
  alignas(16) __shared__ float values[8];
  if (threadIdx.x == 0) __pipeline_memcpy_async(values + 1, out, 16);
}

constexpr Case kCases[] = {
    {"correct", dim3(1, 4), correct},
    {"missing_barrier", dim3(1, 4), missing_barrier},
    {"outside", dim3(1), outside},
    {"before", dim3(1), before},
    {"misaligned", dim3(1), misaligned},
    {"read_only_of_written", dim3(1), read_only_of_written},
    {"memset_past_the_end", dim3(1, 4), correct, 0, 0, dim3(64), 20},
    {"exit_before_barrier", dim3(1), exit_before_barrier},
    {"two_barriers", dim3(1), two_barriers},
    {"barrier_against_shuffle", dim3(1), barrier_against_shuffle},
    {"exit_before_shuffle", dim3(1), exit_before_shuffle},
    {"shuffle_outside_mask", dim3(1), shuffle_outside_mask},
    {"ticket", dim3(1, 4), ticket},
    {"ticket_with_fence_behind_barrier", dim3(1, 4), ticket_with_fence_behind_barrier},
    {"ticket_without_barrier", dim3(1, 4), ticket_without_barrier},
    {"ticket_without_fence", dim3(1, 4), ticket_without_fence},
    {"ticket_with_fence_of_another", dim3(1, 4), ticket_with_fence_of_another},
    {"empty_grid", dim3(0), correct},
    {"deep_block", dim3(1), correct, 0, 0, dim3(1, 1, 65)},
    {"count_atomically", dim3(1), count_atomically},
    {"lost_update", dim3(1), lost_update},
    {"lock", dim3(1, 4), lock},
    {"lock_never_released", dim3(1, 4), lock_never_released},
    {"lock_without_fence", dim3(1, 4), lock_without_fence},
    {"wait_for_the_grid", dim3(1, 4), wait_for_the_grid},
    {"wait_for_a_block_too_many", dim3(1, 4), wait_for_a_block_too_many},
    {"vote", dim3(1), vote},
    {"vote_of_a_branch", dim3(1), vote_of_a_branch},
    {"vote_against_shuffle", dim3(1), vote_against_shuffle},
    {"two_shuffles", dim3(1), two_shuffles},
    {"dynamic", dim3(1, 4), sum_of_dynamic, 256},
    {"large_dynamic", dim3(1, 4), sum_of_dynamic, 100 * 1024, 100 * 1024},
    {"too_large_dynamic", dim3(1), correct, 49 * 1024},
    {"too_large_permitted_dynamic", dim3(1), vote, 228 * 1024, 228 * 1024},
    {"too_large_static", dim3(1), large_static},
    {"too_large_together", dim3(1), correct, 48 * 1024},
    {"past_dynamic", dim3(1), past_dynamic, 256},
    {"past_static", dim3(1), past_static},
    {"overflow", dim3(1), overflow},
    {"copy_and_wait", dim3(1), copy_and_wait},
    {"copy_without_wait", dim3(1), copy_without_wait},
    {"copy_waits_too_little", dim3(1), copy_waits_too_little},
    {"copy_without_barrier", dim3(1), copy_without_barrier},
    {"copy_never_waited_for", dim3(1), copy_never_waited_for},
    {"misaligned_copy", dim3(1), misaligned_copy},
};

}  // namespace

extern "C" {

const char* planted_name(int index) {
  return index < static_cast<int>(std::size(kCases)) ? kCases[index].name : nullptr;
}

// `out` holds 4 floats.
void planted_run(int index, float* out, unsigned* ticket) {
  cudaLaunchConfig_t config{};
  config.gridDim = kCases[index].grid;
  config.blockDim = kCases[index].block;
  config.dynamicSmemBytes = kCases[index].dynamic_bytes;
  if (kCases[index].permitted_bytes > 0)
    cudaFuncSetAttribute(kCases[index].kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         kCases[index].permitted_bytes);
  if (kCases[index].cleared_bytes > 0)
    cudaMemsetAsync(out, 0, kCases[index].cleared_bytes, nullptr);
  cudaLaunchKernelEx(&config, kCases[index].kernel, out, ticket);
}
}
