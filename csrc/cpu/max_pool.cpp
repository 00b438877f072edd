// SPDX-License-Identifier: Apache-2.0
// The CPU entries of batch norm, ReLU and max-pool in one: tensors in, checks, a parameter struct,
// the kernels of the ISA level in use over the threads' rows. The loops are in
// kernels/max_pool-inl.h.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/bn_vectors.h"
#include "cpu/isa.h"
#include "cpu/max_pool_params.h"
#include "cpu/partition.h"
#include "cpu/result_memory.h"

namespace fastresnet::cpu {
namespace {

Tensor empty_pooled(const PoolShape& s, ScalarType dtype) {
  return new_result({s.batch, s.channels, s.out_height, s.out_width}, dtype,
                    MemoryFormat::ChannelsLast);
}

// `training` matters to autograd alone, which passes it on to the backward.
std::tuple<Tensor, Tensor> bn_relu_max_pool_cpu(const Tensor& x, const Tensor& mean,
                                                const Tensor& var, const Tensor& weight,
                                                const Tensor& bias, int64_t kernel, int64_t stride,
                                                int64_t padding, double eps, bool /*training*/) {
  constexpr const char* op = "bn_relu_max_pool";
  const PoolShape s = check_pool(op, x, kernel, stride, padding);
  const BatchNorm bn = check_batch_norm(op, x, mean, var, weight, &bias, eps);
  Tensor out = empty_pooled(s, x.scalar_type());
  Tensor index = empty_pooled(s, ScalarType::Byte);
  MaxPoolForwardParams p{};
  p.shape = s;
  p.dtype = dtype_of(op, x);
  p.x = x.const_data_ptr();
  p.scale = bn.scale.data();
  p.shift = bn.shift.data();
  p.out = out.mutable_data_ptr();
  p.index = index.mutable_data_ptr<uint8_t>();
  const KernelTable& table = kernels();
  Partition(s.batch * s.out_height, s.out_width * s.channels)
      .parallel(
          [&](int64_t, int64_t begin, int64_t end) { table.max_pool_forward(p, begin, end); });
  return {out, index};
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_max_pool_backward_cpu(
    const Tensor& grad, const Tensor& index, const Tensor& x, const Tensor& mean, const Tensor& var,
    const Tensor& weight, int64_t kernel, int64_t stride, int64_t padding, double eps,
    bool training) {
  constexpr const char* op = "bn_relu_max_pool_backward";
  const PoolShape s = check_pool(op, x, kernel, stride, padding);
  check_pooled(op, "grad", grad, x, s, x.scalar_type());
  check_pooled(op, "index", index, x, s, ScalarType::Byte);
  const BatchNorm bn = check_batch_norm(op, x, mean, var, weight, nullptr, eps);
  Tensor dx = new_result_like(x), dweight = empty_vector(x, s.channels);
  MaxPoolBackwardParams p{};
  p.shape = s;
  p.dtype = dtype_of(op, x);
  p.grad = grad.const_data_ptr();
  p.index = index.const_data_ptr<uint8_t>();
  p.x = x.const_data_ptr();
  p.mean = bn.mean;
  p.dx = dx.mutable_data_ptr();
  p.past_caches = past_caches(dx);
  const KernelTable& table = kernels();

  const Partition pooled(s.batch * s.out_height, s.out_width * s.channels);
  const int64_t size = 2 * s.channels;
  std::vector<double> sums(pooled.parts * size);
  std::vector<float> scratch(pooled.parts * size);
  pooled.parallel([&](int64_t part, int64_t begin, int64_t end) {
    table.max_pool_backward_sums(p, begin, end, &scratch[part * size], &sums[part * size]);
  });
  for (int64_t part = 1; part < pooled.parts; ++part)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];

  const Gradient gradient(bn, &sums[0], &sums[s.channels], s.batch * s.height * s.width, training,
                          dweight.mutable_data_ptr<float>());
  Partition(s.batch * s.height, s.width * s.channels)
      .parallel([&](int64_t, int64_t begin, int64_t end) {
        table.max_pool_backward(p, gradient.coefficients(), begin, end);
      });
  return {dx, dweight, to_vector(x, &sums[0])};
}

}  // namespace
}  // namespace fastresnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fastresnet, CPU, m) {
  using namespace fastresnet::cpu;
  m.impl("bn_relu_max_pool", TORCH_BOX(&bn_relu_max_pool_cpu));
  m.impl("bn_relu_max_pool_backward", TORCH_BOX(&bn_relu_max_pool_backward_cpu));
}
