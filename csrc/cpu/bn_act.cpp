// SPDX-License-Identifier: Apache-2.0
// The CPU entries of the batch-norm operators: tensors in, checks, a parameter struct, the kernel
// of the ISA level in use over the threads' ranges of rows. The mathematics is in batch_norm.h, the
// loops over memory in kernels/bn_act-inl.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/bn_vectors.h"
#include "cpu/isa.h"
#include "cpu/partition.h"
#include "cpu/result_memory.h"

namespace fastresnet::cpu {
namespace {

int64_t rows_of(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

std::tuple<Tensor, Tensor> bn_stats_cpu(const Tensor& x) {
  check_input("bn_stats", x);
  const int64_t channels = x.size(1);
  const Partition partition(rows_of(x), channels);
  const DType dtype = dtype_of("bn_stats", x);
  const void* data = x.const_data_ptr();
  std::vector<double> moments(partition.parts * 2 * channels);
  std::vector<float> scratch(partition.parts * 3 * channels);
  const KernelTable& table = kernels();
  partition.parallel([&](int64_t part, int64_t begin, int64_t end) {
    double* mean = &moments[part * 2 * channels];
    table.bn_moments(data, dtype, channels, begin, end, &scratch[part * 3 * channels], mean,
                     mean + channels);
  });

  Tensor mean = empty_vector(x, channels), var = empty_vector(x, channels);
  float* mean_out = mean.mutable_data_ptr<float>();
  float* var_out = var.mutable_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    Moments<double> total{0, 0, 0};
    for (int64_t part = 0; part < partition.parts; ++part) {
      const int64_t rows = partition.rows_of(part).size();
      const double* of_part = &moments[part * 2 * channels];
      total = merge(total, {static_cast<double>(rows), of_part[c], of_part[channels + c]});
    }
    mean_out[c] = static_cast<float>(total.mean);
    var_out[c] = static_cast<float>(total.biased_variance());
  }
  return {mean, var};
}

BnForwardParams forward_params(const Tensor& x, const BatchNorm& bn, Epilogue epilogue,
                               Tensor& out) {
  BnForwardParams p{};
  p.x = x.const_data_ptr();
  p.scale = bn.scale.data();
  p.shift = bn.shift.data();
  p.out = out.mutable_data_ptr();
  p.past_caches = past_caches(out);
  p.rows = rows_of(x);
  p.channels = x.size(1);
  p.dtype = dtype_of("bn", x);
  p.epilogue = epilogue;
  return p;
}

void run_forward(const BnForwardParams& p) {
  const KernelTable& table = kernels();
  Partition(p.rows, p.channels).parallel([&](int64_t, int64_t begin, int64_t end) {
    table.bn_forward(p, begin, end);
  });
}

Tensor empty_mask(const Tensor& x) {
  return new_result({x.size(0), x.size(2), x.size(3), mask_bytes(x.size(1))}, ScalarType::Byte);
}

template <Epilogue epilogue>
Tensor forward(const char* op, const Tensor& x, const Tensor& mean, const Tensor& var,
               const Tensor& weight, const Tensor& bias, double eps) {
  check_input(op, x);
  const BatchNorm bn = check_batch_norm(op, x, mean, var, weight, &bias, eps);
  Tensor out = new_result_like(x);
  run_forward(forward_params(x, bn, epilogue, out));
  return out;
}

// `training` matters to autograd alone, which passes it on to the backward.
Tensor bn_cpu(const Tensor& x, const Tensor& mean, const Tensor& var, const Tensor& weight,
              const Tensor& bias, double eps, bool /*training*/) {
  return forward<Epilogue::none>("bn", x, mean, var, weight, bias, eps);
}

Tensor bn_relu_cpu(const Tensor& x, const Tensor& mean, const Tensor& var, const Tensor& weight,
                   const Tensor& bias, double eps, bool /*training*/) {
  return forward<Epilogue::relu>("bn_relu", x, mean, var, weight, bias, eps);
}

std::tuple<Tensor, Tensor> bn_add_relu_cpu(const Tensor& x, const Tensor& mean, const Tensor& var,
                                           const Tensor& weight, const Tensor& bias,
                                           const Tensor& residual, double eps, bool /*training*/) {
  constexpr const char* op = "bn_add_relu";
  check_input(op, x);
  check_like_input(op, "residual", residual, x);
  const BatchNorm bn = check_batch_norm(op, x, mean, var, weight, &bias, eps);
  Tensor out = new_result_like(x), mask = empty_mask(x);
  BnForwardParams p = forward_params(x, bn, Epilogue::add_relu, out);
  p.residual = residual.const_data_ptr();
  p.mask = mask.mutable_data_ptr<uint8_t>();
  run_forward(p);
  return {out, mask};
}

std::tuple<Tensor, Tensor> bn_add_bn_relu_cpu(
    const Tensor& x, const Tensor& mean, const Tensor& var, const Tensor& weight,
    const Tensor& bias, const Tensor& residual, const Tensor& residual_mean,
    const Tensor& residual_var, const Tensor& residual_weight, const Tensor& residual_bias,
    double eps, double residual_eps, bool /*training*/) {
  constexpr const char* op = "bn_add_bn_relu";
  check_input(op, x);
  check_like_input(op, "residual", residual, x);
  const BatchNorm bn = check_batch_norm(op, x, mean, var, weight, &bias, eps);
  const BatchNorm residual_bn =
      check_batch_norm(op, x, residual_mean, residual_var, residual_weight, &residual_bias,
                       residual_eps, "residual_");
  Tensor out = new_result_like(x), mask = empty_mask(x);
  BnForwardParams p = forward_params(x, bn, Epilogue::add_bn_relu, out);
  p.residual = residual.const_data_ptr();
  p.residual_scale = residual_bn.scale.data();
  p.residual_shift = residual_bn.shift.data();
  p.mask = mask.mutable_data_ptr<uint8_t>();
  run_forward(p);
  return {out, mask};
}

// x and grad checked, dx made.
BnBackwardParams backward_params(const char* op, const Tensor& grad, const Tensor& x,
                                 const BatchNorm& bn, Epilogue epilogue, Tensor& dx) {
  check_like_input(op, "grad", grad, x);
  BnBackwardParams p{};
  p.grad = grad.const_data_ptr();
  p.x = x.const_data_ptr();
  p.mean = bn.mean;
  p.scale = bn.scale.data();
  p.shift = bn.shift.data();
  p.dx = dx.mutable_data_ptr();
  p.rows = rows_of(x);
  p.channels = x.size(1);
  p.dtype = dtype_of(op, x);
  p.epilogue = epilogue;
  return p;
}

// [3, channels]: of g, of g * (x - mean), of g * (residual - residual_mean).
std::vector<double> backward_sums(const BnBackwardParams& p) {
  const Partition partition(p.rows, p.channels);
  const int64_t size = 3 * p.channels;
  std::vector<double> sums(partition.parts * size);
  std::vector<float> scratch(partition.parts * size);
  const KernelTable& table = kernels();
  partition.parallel([&](int64_t part, int64_t begin, int64_t end) {
    table.bn_backward_sums(p, begin, end, &scratch[part * size], &sums[part * size]);
  });
  for (int64_t part = 1; part < partition.parts; ++part)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
  return sums;
}

void run_backward(const BnBackwardParams& p, const BnCoefficients& x,
                  const BnCoefficients& residual) {
  const KernelTable& table = kernels();
  Partition(p.rows, p.channels).parallel([&](int64_t, int64_t begin, int64_t end) {
    table.bn_backward(p, x, residual, begin, end);
  });
}

// The forms with one batch norm; p holds all but the coefficients.
std::tuple<Tensor, Tensor> single_backward(const BnBackwardParams& p, const Tensor& x,
                                           const BatchNorm& bn, bool training) {
  const std::vector<double> sums = backward_sums(p);
  Tensor dweight = empty_vector(x, p.channels);
  const Gradient gradient(bn, &sums[0], &sums[p.channels], p.rows, training,
                          dweight.mutable_data_ptr<float>());
  run_backward(p, gradient.coefficients(), {});
  return {dweight, to_vector(x, &sums[0])};
}

std::tuple<Tensor, Tensor, Tensor> bn_backward_cpu(const Tensor& grad, const Tensor& x,
                                                   const Tensor& mean, const Tensor& var,
                                                   const Tensor& weight, double eps,
                                                   bool training) {
  constexpr const char* op = "bn_backward";
  check_input(op, x);
  const BatchNorm bn = check_batch_norm(op, x, mean, var, weight, nullptr, eps);
  Tensor dx = new_result_like(x);
  const BnBackwardParams p = backward_params(op, grad, x, bn, Epilogue::none, dx);
  const auto [dweight, dbias] = single_backward(p, x, bn, training);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_backward_cpu(const Tensor& grad, const Tensor& x,
                                                        const Tensor& mean, const Tensor& var,
                                                        const Tensor& weight, const Tensor& bias,
                                                        double eps, bool training) {
  constexpr const char* op = "bn_relu_backward";
  check_input(op, x);
  const BatchNorm bn = check_batch_norm(op, x, mean, var, weight, &bias, eps);
  Tensor dx = new_result_like(x);
  const BnBackwardParams p = backward_params(op, grad, x, bn, Epilogue::relu, dx);
  const auto [dweight, dbias] = single_backward(p, x, bn, training);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_relu_backward_cpu(
    const Tensor& grad, const Tensor& mask, const Tensor& x, const Tensor& mean, const Tensor& var,
    const Tensor& weight, double eps, bool training) {
  constexpr const char* op = "bn_add_relu_backward";
  check_input(op, x);
  const BatchNorm bn = check_batch_norm(op, x, mean, var, weight, nullptr, eps);
  Tensor dx = new_result_like(x), dresidual = new_result_like(x);
  BnBackwardParams p = backward_params(op, grad, x, bn, Epilogue::add_relu, dx);
  p.mask = check_mask(op, mask, x);
  p.dresidual = dresidual.mutable_data_ptr();
  const auto [dweight, dbias] = single_backward(p, x, bn, training);
  return {dx, dweight, dbias, dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_bn_relu_backward_cpu(
    const Tensor& grad, const Tensor& mask, const Tensor& x, const Tensor& mean, const Tensor& var,
    const Tensor& weight, const Tensor& residual, const Tensor& residual_mean,
    const Tensor& residual_var, const Tensor& residual_weight, double eps, double residual_eps,
    bool training) {
  constexpr const char* op = "bn_add_bn_relu_backward";
  check_input(op, x);
  check_like_input(op, "residual", residual, x);
  const BatchNorm bn = check_batch_norm(op, x, mean, var, weight, nullptr, eps);
  const BatchNorm residual_bn = check_batch_norm(
      op, x, residual_mean, residual_var, residual_weight, nullptr, residual_eps, "residual_");
  Tensor dx = new_result_like(x), dresidual = new_result_like(x);
  BnBackwardParams p = backward_params(op, grad, x, bn, Epilogue::add_bn_relu, dx);
  p.mask = check_mask(op, mask, x);
  p.residual = residual.const_data_ptr();
  p.residual_mean = residual_bn.mean;
  p.dresidual = dresidual.mutable_data_ptr();

  const std::vector<double> sums = backward_sums(p);
  const double *sum_g = &sums[0], *sum_gx = &sums[p.channels], *sum_gr = &sums[2 * p.channels];
  Tensor dweight = empty_vector(x, p.channels), dresidual_weight = empty_vector(x, p.channels);
  const Gradient gradient(bn, sum_g, sum_gx, p.rows, training, dweight.mutable_data_ptr<float>());
  const Gradient residual_gradient(residual_bn, sum_g, sum_gr, p.rows, training,
                                   dresidual_weight.mutable_data_ptr<float>());
  run_backward(p, gradient.coefficients(), residual_gradient.coefficients());
  return {dx, dweight, to_vector(x, sum_g), dresidual, dresidual_weight};
}

// The sums that open the backward of a block: of grad where the mask lets it pass, alone and times
// x - mean, and the same with the residual's.
std::tuple<Tensor, Tensor> bn_sums_cpu(const Tensor& grad, std::optional<Tensor> mask,
                                       const Tensor& x, const Tensor& mean,
                                       std::optional<Tensor> residual,
                                       std::optional<Tensor> residual_mean) {
  constexpr const char* op = "bn_sums";
  check_input(op, x);
  check_like_input(op, "grad", grad, x);
  check(residual.has_value() == residual_mean.has_value(), op,
        ": expected residual with residual_mean");
  check(mask || !residual, op, ": expected a mask with residual");
  BnBackwardParams p{};
  p.grad = grad.const_data_ptr();
  p.x = x.const_data_ptr();
  p.mean = check_vector(op, "mean", mean, x);
  p.rows = rows_of(x);
  p.channels = x.size(1);
  p.dtype = dtype_of(op, x);
  p.epilogue = residual ? Epilogue::add_bn_relu : mask ? Epilogue::add_relu : Epilogue::none;
  if (mask) p.mask = check_mask(op, *mask, x);
  if (residual) {
    check_like_input(op, "residual", *residual, x);
    p.residual = residual->const_data_ptr();
    p.residual_mean = check_vector(op, "residual_mean", *residual_mean, x);
  }
  const std::vector<double> sums = backward_sums(p);
  const auto rows = [&](int64_t second) {
    Tensor out = torch::stable::empty({2, second ? p.channels : 0}, ScalarType::Double,
                                      std::nullopt, x.device());
    double* to = out.mutable_data_ptr<double>();
    if (second) {
      std::copy_n(&sums[0], p.channels, to);
      std::copy_n(&sums[second * p.channels], p.channels, to + p.channels);
    }
    return out;
  };
  return {rows(1), rows(residual ? 2 : 0)};
}

}  // namespace
}  // namespace fastresnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fastresnet, CPU, m) {
  using namespace fastresnet::cpu;
  m.impl("bn_stats", TORCH_BOX(&bn_stats_cpu));
  m.impl("bn_sums", TORCH_BOX(&bn_sums_cpu));
  m.impl("bn", TORCH_BOX(&bn_cpu));
  m.impl("bn_backward", TORCH_BOX(&bn_backward_cpu));
  m.impl("bn_relu", TORCH_BOX(&bn_relu_cpu));
  m.impl("bn_relu_backward", TORCH_BOX(&bn_relu_backward_cpu));
  m.impl("bn_add_relu", TORCH_BOX(&bn_add_relu_cpu));
  m.impl("bn_add_relu_backward", TORCH_BOX(&bn_add_relu_backward_cpu));
  m.impl("bn_add_bn_relu", TORCH_BOX(&bn_add_bn_relu_cpu));
  m.impl("bn_add_bn_relu_backward", TORCH_BOX(&bn_add_bn_relu_backward_cpu));
}
