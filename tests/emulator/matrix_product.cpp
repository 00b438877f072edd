// SPDX-License-Identifier: Apache-2.0
// A small product of matrices as tensor cores do it (cp.async, ldmatrix, mma), and the same with
// one mistake each: the test of that part of the emulator. No kernel of the package uses it yet.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_pipeline.h"
#include "tensor_core.h"

namespace {

enum class Mistake {
  none,
  short_wait,
  no_barrier_after_wait,
  no_barrier_before_copy,
  misaligned_row,
  part_of_a_warp,
};

constexpr int kRows = 16, kColumns = 16, kDepth = 16;

// c [16, 16] = a [16, depth] * b [16, depth]^T, two buffers, two warps of 8 columns each.
template <typename scalar_t>
void matrix_product_kernel(const scalar_t* a, const scalar_t* b, float* c, int depth,
                           Mistake mistake) {
  alignas(16) __shared__ scalar_t a_tile[2][kRows][kDepth], b_tile[2][kColumns][kDepth];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const auto copy = [&](int step) {  // 64 threads, 16 bytes each
    if (step * kDepth < depth) {
      const int row = threadIdx.x % 32 / 2, column = threadIdx.x % 2 * 8;
      const int64_t from = int64_t{row} * depth + step * kDepth + column;
      scalar_t* to = warp == 0 ? &a_tile[step % 2][row][column] : &b_tile[step % 2][row][column];
      __pipeline_memcpy_async(to, (warp == 0 ? a : b) + from, 16);
    }
    __pipeline_commit();
  };

  float sums[4] = {};
  copy(0);
  for (int step = 0; step * kDepth < depth; ++step) {
    copy(step + 1);
    __pipeline_wait_prior(mistake == Mistake::short_wait ? 2 : 1);
    if (mistake != Mistake::no_barrier_after_wait) __syncthreads();
    const int shift = mistake == Mistake::misaligned_row ? 1 : 0;
    unsigned a_words[4], b_words[4];
    ldmatrix_x4(a_words, &a_tile[step % 2][lane % 16][lane / 16 * 8] + shift);
    ldmatrix_x4(b_words, &b_tile[step % 2][lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
    if (mistake == Mistake::part_of_a_warp && lane == 5) return;
    mma_m16n8k16<scalar_t>(sums, a_words, {b_words[2 * warp], b_words[2 * warp + 1]});
    if (mistake != Mistake::no_barrier_before_copy) __syncthreads();
  }
  __pipeline_wait_prior(0);
  for (int i = 0; i < 4; ++i)
    __stwb(c + (lane / 4 + i / 2 * 8) * kColumns + warp * 8 + lane % 4 * 2 + i % 2, sums[i]);
}

}  // namespace

extern "C" void matrix_product(Mistake mistake, bool bfloat16, int64_t depth, const void* a,
                               const void* b, float* c) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(64);
  const auto run = [&]<typename scalar_t>() {
    cudaLaunchKernelEx(&config, matrix_product_kernel<scalar_t>, static_cast<const scalar_t*>(a),
                       static_cast<const scalar_t*>(b), c, static_cast<int>(depth), mistake);
  };
  if (bfloat16)
    run.operator()<__nv_bfloat16>();
  else
    run.operator()<__half>();
}
