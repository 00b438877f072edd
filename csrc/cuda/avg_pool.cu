// SPDX-License-Identifier: Apache-2.0
// Average pooling over whole images on CUDA: checks, outputs, and the launches of avg_pool.cuh on
// torch's current stream.
#include "cuda/avg_pool.cuh"

#include <torch/csrc/stable/library.h>

#include "check.h"
#include "cuda/entry.h"

namespace fastresnet::cuda {
namespace {

Tensor global_avg_pool(const Tensor& x) {
  constexpr const char* kOp = "global_avg_pool";
  check_input(kOp, x);
  const DeviceGuard guard(x.get_device_index());
  Tensor out =
      torch::stable::empty({x.size(0), x.size(1), 1, 1}, x.scalar_type(), std::nullopt, x.device());
  AvgPoolParams p{};
  p.x = x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.shape = {x.size(0), x.size(2), x.size(3), x.size(1)};
  p.extent = extent_of(out);
  p.dtype = dtype_of(kOp, x);
  check_cuda(kOp, launch_global_avg_pool(p, current_queue(kOp, x)));
  return out;
}

Tensor global_avg_pool_backward(const Tensor& grad, int64_t height, int64_t width) {
  constexpr const char* kOp = "global_avg_pool_backward";
  AvgPoolBackwardParams p{};
  p.shape = check_averages(kOp, grad, height, width);
  const DeviceGuard guard(grad.get_device_index());
  Tensor dx =
      torch::stable::empty({grad.size(0), grad.size(1), height, width}, grad.scalar_type(),
                           std::nullopt, grad.device(), std::nullopt, MemoryFormat::ChannelsLast);
  p.grad = grad.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.extent = extent_of(dx);
  p.dtype = dtype_of(kOp, grad, "grad");
  check_cuda(kOp, launch_global_avg_pool_backward(p, current_queue(kOp, grad)));
  return dx;
}

}  // namespace
}  // namespace fastresnet::cuda

STABLE_TORCH_LIBRARY_IMPL(fastresnet, CUDA, m) {
  m.impl("global_avg_pool", TORCH_BOX(&fastresnet::cuda::global_avg_pool));
  m.impl("global_avg_pool_backward", TORCH_BOX(&fastresnet::cuda::global_avg_pool_backward));
}
