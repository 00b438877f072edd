// SPDX-License-Identifier: Apache-2.0
// The CPU entries of the batch-norm operators: tensors in, checks, a parameter struct, the kernel
// of the ISA level in use over the threads' ranges of rows. The mathematics is in batch_norm.h, the
// loops over memory in kernels/bn_act-inl.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "batch_norm.h"
#include "check.h"
#include "cpu/isa.h"

namespace fastresnet::cpu {
namespace {

// Rows are cut into as many parts as there are threads, fewer when a part would not be worth a
// thread's wake-up. The cut depends on nothing else, so sums are the same from run to run.
struct Partition {
  int64_t rows, parts;

  Partition(int64_t rows, int64_t channels) : rows(rows) {
    constexpr int64_t kWorthAThread = 16 * 1024;
    const int64_t threads = torch::stable::get_num_threads();
    parts = std::clamp<int64_t>(rows * channels / kWorthAThread, 1, std::min(rows, threads));
  }

  // body(part, first row, last row), which must not throw.
  template <class Body>
  void parallel(Body body) const {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) body(i, rows * i / parts, rows * (i + 1) / parts);
    });
  }
};

// The [channels] vectors of one batch norm, and what they make of x in the forward.
struct BatchNorm {
  const float *mean, *var, *weight, *bias;
  float eps;
  std::vector<float> scale, shift;

  BatchNorm(int64_t channels, const float* mean, const float* var, const float* weight,
            const float* bias, double eps)
      : mean(mean),
        var(var),
        weight(weight),
        bias(bias),
        eps(static_cast<float>(eps)),
        scale(channels),
        shift(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      const auto affine = normalise(mean[c], var[c], weight[c], bias ? bias[c] : 0.0f, this->eps);
      scale[c] = affine.scale;
      shift[c] = affine.shift;
    }
  }
};

// The coefficients of dx from the sums, and the gradient of weight.
struct Gradient {
  bool training;
  std::vector<float> scale, offset, slope;

  Gradient(const BatchNorm& bn, const double* sum_g, const double* sum_gx, int64_t rows,
           bool training, float* dweight)
      : training(training), scale(bn.scale.size()), offset(scale.size()), slope(scale.size()) {
    for (size_t c = 0; c < scale.size(); ++c) {
      const auto k = input_gradient<double>(sum_g[c], sum_gx[c], static_cast<double>(rows),
                                            bn.var[c], bn.weight[c], bn.eps, training);
      scale[c] = static_cast<float>(k.scale);
      offset[c] = static_cast<float>(k.offset);
      slope[c] = static_cast<float>(k.slope);
      dweight[c] = static_cast<float>(weight_gradient(sum_gx[c], bn.var[c], bn.eps));
    }
  }

  BnCoefficients coefficients() const {
    if (!training) return {scale.data(), nullptr, nullptr};
    return {scale.data(), offset.data(), slope.data()};
  }
};

int64_t rows_of(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

BatchNorm check_batch_norm(const char* op, const Tensor& x, const Tensor& mean, const Tensor& var,
                           const Tensor& weight, const Tensor* bias, double eps) {
  return BatchNorm(x.size(1), check_vector(op, "mean", mean, x), check_vector(op, "var", var, x),
                   check_vector(op, "weight", weight, x),
                   bias ? check_vector(op, "bias", *bias, x) : nullptr, eps);
}

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
      const int64_t rows =
          partition.rows * (part + 1) / partition.parts - partition.rows * part / partition.parts;
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
  return torch::stable::empty({x.size(0), x.size(2), x.size(3), mask_bytes(x.size(1))},
                              ScalarType::Byte, std::nullopt, x.device());
}

template <Epilogue epilogue>
Tensor forward(const char* op, const Tensor& x, const Tensor& mean, const Tensor& var,
               const Tensor& weight, const Tensor& bias, double eps) {
  check_input(op, x);
  const BatchNorm bn = check_batch_norm(op, x, mean, var, weight, &bias, eps);
  Tensor out = empty_channels_last(x);
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
  Tensor out = empty_channels_last(x), mask = empty_mask(x);
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
  const BatchNorm residual_bn = check_batch_norm(op, x, residual_mean, residual_var,
                                                 residual_weight, &residual_bias, residual_eps);
  Tensor out = empty_channels_last(x), mask = empty_mask(x);
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

Tensor to_vector(const Tensor& like, const double* values) {
  Tensor out = empty_vector(like, like.size(1));
  std::copy(values, values + like.size(1), out.mutable_data_ptr<float>());
  return out;
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
  Tensor dx = empty_channels_last(x);
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
  Tensor dx = empty_channels_last(x);
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
  Tensor dx = empty_channels_last(x), dresidual = empty_channels_last(x);
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
  const BatchNorm residual_bn =
      check_batch_norm(op, x, residual_mean, residual_var, residual_weight, nullptr, residual_eps);
  Tensor dx = empty_channels_last(x), dresidual = empty_channels_last(x);
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

}  // namespace
}  // namespace fastresnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fastresnet, CPU, m) {
  using namespace fastresnet::cpu;
  m.impl("bn_stats", TORCH_BOX(&bn_stats_cpu));
  m.impl("bn", TORCH_BOX(&bn_cpu));
  m.impl("bn_backward", TORCH_BOX(&bn_backward_cpu));
  m.impl("bn_relu", TORCH_BOX(&bn_relu_cpu));
  m.impl("bn_relu_backward", TORCH_BOX(&bn_relu_backward_cpu));
  m.impl("bn_add_relu", TORCH_BOX(&bn_add_relu_cpu));
  m.impl("bn_add_relu_backward", TORCH_BOX(&bn_add_relu_backward_cpu));
  m.impl("bn_add_bn_relu", TORCH_BOX(&bn_add_bn_relu_cpu));
  m.impl("bn_add_bn_relu_backward", TORCH_BOX(&bn_add_bn_relu_backward_cpu));
}
