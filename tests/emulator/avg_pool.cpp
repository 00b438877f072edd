// SPDX-License-Identifier: Apache-2.0
// The launches of csrc/cuda/avg_pool.cuh, callable from Python through ctypes. `sizes` are batch,
// height, width, channels.
#include "cuda/avg_pool.cuh"

namespace {

using namespace fastresnet;
using namespace fastresnet::cuda;

AvgPoolShape shape_of(const int64_t* sizes) { return {sizes[0], sizes[1], sizes[2], sizes[3]}; }

}  // namespace

extern "C" {

void global_avg_pool(DType dtype, const int64_t* sizes, int multiprocessors, const void* x,
                     void* out) {
  const AvgPoolShape s = shape_of(sizes);
  const AvgPoolParams p{
      .x = x, .out = out, .shape = s, .extent = {s.batch, s.channels, 0}, .dtype = dtype};
  launch_global_avg_pool(p, {nullptr, multiprocessors});
}

void global_avg_pool_backward(DType dtype, const int64_t* sizes, int multiprocessors,
                              const void* grad, void* dx) {
  const AvgPoolShape s = shape_of(sizes);
  const AvgPoolBackwardParams p{.grad = grad,
                                .dx = dx,
                                .shape = s,
                                .extent = {s.batch * s.height * s.width, s.channels, 0},
                                .dtype = dtype};
  launch_global_avg_pool_backward(p, {nullptr, multiprocessors});
}
}
