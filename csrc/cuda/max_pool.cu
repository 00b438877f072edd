// SPDX-License-Identifier: Apache-2.0
// Batch norm, ReLU and max-pool in one on CUDA: checks, outputs, scratch memory, and the launches
// of max_pool.cuh on torch's current stream.
#include "cuda/max_pool.cuh"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "check.h"
#include "cuda/entry.h"

namespace fastresnet::cuda {
namespace {

PoolShape check_pool_of_32_bits(const char* op, const Tensor& x, int64_t kernel, int64_t stride,
                                int64_t padding) {
  const PoolShape s = check_pool(op, x, kernel, stride, padding);
  check(s.batch * s.height * s.width <= std::numeric_limits<int32_t>::max(), op,
        ": expected x of fewer than 2^31 pixels, got ", shape(x));
  return s;
}

Tensor empty_pooled(const PoolShape& s, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty({s.batch, s.channels, s.out_height, s.out_width}, dtype, std::nullopt,
                              like.device(), std::nullopt, MemoryFormat::ChannelsLast);
}

// `training` matters to autograd alone, which passes it on to the backward.
std::tuple<Tensor, Tensor> bn_relu_max_pool(const Tensor& x, const Tensor& mean, const Tensor& var,
                                            const Tensor& weight, const Tensor& bias,
                                            int64_t kernel, int64_t stride, int64_t padding,
                                            double eps, bool /*training*/) {
  constexpr const char* kOp = "bn_relu_max_pool";
  PoolForwardParams p{};
  p.shape = check_pool_of_32_bits(kOp, x, kernel, stride, padding);
  p.norm = NormalisationTensors{mean, var, weight, &bias, eps}.checked(kOp, x);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = empty_pooled(p.shape, x.scalar_type(), x);
  Tensor index = empty_pooled(p.shape, ScalarType::Byte, x);
  p.x = x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.index = index.mutable_data_ptr<uint8_t>();
  p.extent = extent_of(out);
  p.dtype = dtype_of(kOp, x);
  check_cuda(kOp, launch_max_pool_forward(p, current_queue(kOp, x)));
  return {out, index};
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_max_pool_backward(const Tensor& grad,
                                                             const Tensor& index, const Tensor& x,
                                                             const Tensor& mean, const Tensor& var,
                                                             const Tensor& weight, int64_t kernel,
                                                             int64_t stride, int64_t padding,
                                                             double eps, bool training) {
  constexpr const char* kOp = "bn_relu_max_pool_backward";
  PoolBackwardParams p{};
  p.shape = check_pool_of_32_bits(kOp, x, kernel, stride, padding);
  check_pooled(kOp, "grad", grad, x, p.shape, x.scalar_type());
  check_pooled(kOp, "index", index, x, p.shape, ScalarType::Byte);
  p.norm = NormalisationTensors{mean, var, weight, nullptr, eps}.checked(kOp, x);
  const DeviceGuard guard(x.get_device_index());
  const Queue queue = current_queue(kOp, x);
  Tensor dx = empty_channels_last(x);
  Tensor dweight = empty_vector(x, x.size(1)), dbias = empty_vector(x, x.size(1));
  Tensor sum_gx = empty_vector(x, x.size(1));
  p.grad = grad.const_data_ptr();
  p.index = index.const_data_ptr<uint8_t>();
  p.x = x.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr<float>();
  p.dbias = dbias.mutable_data_ptr<float>();
  p.sum_gx = sum_gx.mutable_data_ptr<float>();
  p.extent = extent_of(x);
  p.dtype = dtype_of(kOp, x);
  p.training = training;
  Tensor workspace =
      empty_bytes(x, max_pool_workspace_bytes(p.extent.rows, p.extent.channels, queue));
  check_cuda(kOp, launch_max_pool_backward(p, workspace.mutable_data_ptr(), queue));
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fastresnet::cuda

STABLE_TORCH_LIBRARY_IMPL(fastresnet, CUDA, m) {
  m.impl("bn_relu_max_pool", TORCH_BOX(&fastresnet::cuda::bn_relu_max_pool));
  m.impl("bn_relu_max_pool_backward", TORCH_BOX(&fastresnet::cuda::bn_relu_max_pool_backward));
}
