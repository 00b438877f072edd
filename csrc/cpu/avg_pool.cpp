// SPDX-License-Identifier: Apache-2.0
// The CPU entries of average pooling over whole images: checks, a parameter struct, the kernels of
// the ISA level in use over the threads' images.
#include <torch/csrc/stable/library.h>

#include "check.h"
#include "cpu/avg_pool_params.h"
#include "cpu/isa.h"
#include "cpu/partition.h"
#include "cpu/result_memory.h"

namespace fastresnet::cpu {
namespace {

Partition partition(const AvgPoolShape& s) {
  return Partition(s.batch, s.height * s.width * s.channels);
}

Tensor global_avg_pool_cpu(const Tensor& x) {
  constexpr const char* op = "global_avg_pool";
  check_input(op, x);
  Tensor out = new_result({x.size(0), x.size(1), 1, 1}, x.scalar_type());
  AvgPoolParams p{};
  p.shape = {x.size(0), x.size(2), x.size(3), x.size(1)};
  p.dtype = dtype_of(op, x);
  p.x = x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  partition(p.shape).parallel(
      [&](int64_t, int64_t begin, int64_t end) { kernels().global_avg_pool(p, begin, end); });
  return out;
}

Tensor global_avg_pool_backward_cpu(const Tensor& grad, int64_t height, int64_t width) {
  constexpr const char* op = "global_avg_pool_backward";
  AvgPoolBackwardParams p{};
  p.shape = check_averages(op, grad, height, width);
  p.dtype = dtype_of(op, grad, "grad");
  Tensor dx = new_result({grad.size(0), grad.size(1), height, width}, grad.scalar_type(),
                         MemoryFormat::ChannelsLast);
  p.grad = grad.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  partition(p.shape).parallel([&](int64_t, int64_t begin, int64_t end) {
    kernels().global_avg_pool_backward(p, begin, end);
  });
  return dx;
}

}  // namespace
}  // namespace fastresnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fastresnet, CPU, m) {
  using namespace fastresnet::cpu;
  m.impl("global_avg_pool", TORCH_BOX(&global_avg_pool_cpu));
  m.impl("global_avg_pool_backward", TORCH_BOX(&global_avg_pool_backward_cpu));
}
