// SPDX-License-Identifier: Apache-2.0
// The launches of csrc/cuda/max_pool.cuh, callable from Python through ctypes. `sizes` are batch,
// height, width, channels, out_height, out_width, kernel, stride, padding.
#include "cuda/max_pool.cuh"

namespace {

using namespace fastresnet;
using namespace fastresnet::cuda;

PoolShape shape_of(const int64_t* sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8]};
}

}  // namespace

extern "C" {

int64_t max_pool_workspace(int64_t rows, int64_t channels, int multiprocessors) {
  return max_pool_workspace_bytes(rows, channels, {nullptr, multiprocessors});
}

void max_pool_forward(DType dtype, const int64_t* sizes, int multiprocessors, const void* x,
                      float* const* norm, float eps, void* out, uint8_t* index) {
  const PoolShape s = shape_of(sizes);
  const PoolForwardParams p{.x = x,
                            .norm = {norm[0], norm[1], norm[2], norm[3], eps},
                            .out = out,
                            .index = index,
                            .shape = s,
                            .extent = {s.batch * s.out_height * s.out_width, s.channels, 0},
                            .dtype = dtype};
  launch_max_pool_forward(p, {nullptr, multiprocessors});
}

void max_pool_backward(DType dtype, bool training, const int64_t* sizes, int multiprocessors,
                       const void* grad, const uint8_t* index, const void* x, float* const* norm,
                       float eps, void* dx, float* dweight, float* dbias, float* sum_gx,
                       void* workspace) {
  const PoolShape s = shape_of(sizes);
  const PoolBackwardParams p{.grad = grad,
                             .index = index,
                             .x = x,
                             .norm = {norm[0], norm[1], norm[2], nullptr, eps},
                             .dx = dx,
                             .dweight = dweight,
                             .dbias = dbias,
                             .sum_gx = sum_gx,
                             .shape = s,
                             .extent = {s.batch * s.height * s.width, s.channels, 0},
                             .dtype = dtype,
                             .training = training};
  launch_max_pool_backward(p, workspace, {nullptr, multiprocessors});
}
}
