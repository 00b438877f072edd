// SPDX-License-Identifier: Apache-2.0
// The CPU entries of the convolutions: tensors in, checks, outputs, parameters for the kernels.
// conv_sharing.h says who computes what.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "batch_norm.h"
#include "check.h"
#include "cpu/bn_vectors.h"
#include "cpu/conv_params.h"
#include "cpu/conv_sharing.h"
#include "cpu/conv_weight.h"
#include "cpu/result_memory.h"

namespace fastresnet::cpu {
namespace {

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                    int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// weight: its sizes.
ConvShape check_conv(const char* op, const Tensor& x, Sizes weight, int64_t stride, int64_t padding,
                     int64_t dilation, int64_t groups) {
  check_input(op, x);
  check(groups >= 1 && x.size(1) % groups == 0, op, ": expected groups that divide the ", x.size(1),
        " channels, got ", groups);
  const int64_t width = x.size(1) / groups;
  check(weight.size() == 4 && weight[0] > 0 && weight[1] == width && weight[2] > 0 && weight[3] > 0,
        op, ": expected weight of shape [out_channels, ", width, ", height, width], got ",
        shape(weight));
  check(groups == 1 ||
            (weight[0] == x.size(1) && (width % kChannelBlock == 0 || kChannelBlock % width == 0)),
        op, ": expected groups with as many output as input channels, a number that divides ",
        kChannelBlock, " or is divided by it, got ", shape(weight), " in ", groups, " groups");
  check(stride >= 1 && stride <= kMaxStride, op, ": expected a stride of 1 to ", kMaxStride,
        ", got ", stride);
  check(padding >= 0 && dilation >= 1, op, ": expected padding >= 0 and dilation >= 1, got ",
        padding, " and ", dilation);
  ConvShape s{x.size(0), x.size(2), x.size(3), x.size(1), 0,        0,     weight[0],
              weight[2], weight[3], stride,    padding,   dilation, groups};
  s.out_height = output_size(s.height, s.kernel_height, stride, padding, dilation);
  s.out_width = output_size(s.width, s.kernel_width, stride, padding, dilation);
  check(s.height + 2 * padding >= dilation * (s.kernel_height - 1) + 1 &&
            s.width + 2 * padding >= dilation * (s.kernel_width - 1) + 1,
        op, ": expected x of at least the kernel's size, got ", shape(x), " and ", shape(weight));
  return s;
}

ConvShape check_conv(const char* op, const Tensor& x, const Tensor& weight, int64_t stride,
                     int64_t padding, int64_t dilation, int64_t groups) {
  check(weight.defined(), op, ": expected weight, got None");
  dtype_of(op, weight, "weight");
  check_device(op, "weight", weight, x);
  return check_conv(op, x, weight.sizes(), stride, padding, dilation, groups);
}

// y of an operator: shape of the convolution's output, dtype of x.
Tensor new_output(const ConvShape& s, const Tensor& x) {
  return new_result({s.batch, s.out_channels, s.out_height, s.out_width}, x.scalar_type(),
                    MemoryFormat::ChannelsLast);
}

// What is done to the input before a convolution: relu(batch norm), or nothing.
std::optional<BatchNorm> check_prologue(const char* op, const Tensor& x,
                                        const std::optional<Tensor>& mean,
                                        const std::optional<Tensor>& var,
                                        const std::optional<Tensor>& weight,
                                        const std::optional<Tensor>& bias, double eps) {
  const bool given = mean.has_value();
  check(var.has_value() == given && weight.has_value() == given && bias.has_value() == given, op,
        ": expected all of x_mean, x_var, x_weight and x_bias, or none");
  if (!given) return std::nullopt;
  return check_batch_norm(op, x, *mean, *var, *weight, &*bias, eps, "x_");
}

std::tuple<int64_t, bool, bool, bool> conv_method_cpu(const Tensor& x, const Tensor& weight,
                                                      int64_t stride, int64_t padding,
                                                      int64_t dilation, int64_t groups,
                                                      bool normalised, bool packed, bool backward,
                                                      bool wants_dx) {
  constexpr const char* op = "conv_method";
  const ConvShape s = check_conv(op, x, weight, stride, padding, dilation, groups);
  const DType dtype = dtype_of(op, x);
  const auto sharing = backward ? share_backward(s, dtype, normalised, wants_dx)
                                : share_forward(s, dtype, normalised, packed);
  const ConvPlan& plan = sharing->plan;
  return {plan.tile, plan.by_places, plan.patches, plan.in_place};
}

std::tuple<Tensor, Tensor, Tensor> conv_stats_cpu(
    const Tensor& x, std::optional<Tensor> x_mean, std::optional<Tensor> x_var,
    std::optional<Tensor> x_weight, std::optional<Tensor> x_bias, double x_eps,
    const Tensor& weight, int64_t stride, int64_t padding, int64_t dilation, int64_t groups) {
  constexpr const char* op = "conv_stats";
  const ConvShape s = check_conv(op, x, weight, stride, padding, dilation, groups);
  const std::optional<BatchNorm> prologue =
      check_prologue(op, x, x_mean, x_var, x_weight, x_bias, x_eps);
  const DType dtype = dtype_of(op, x);

  Tensor y = new_output(s, x);
  ConvForwardParams p{};
  p.dtype = dtype;
  p.x = x.const_data_ptr();
  if (prologue) {
    p.scale = prologue->scale.data();
    p.shift = prologue->shift.data();
  }
  p.y = y.mutable_data_ptr();
  p.past_caches = past_caches(y);

  const auto sharing = share_forward(s, dtype, prologue.has_value(), false);
  p.plan = &sharing->plan;
  const WeightPacking packing(weight, sharing->plan, dtype, false);
  const OutputMoments moments = forward(p, *sharing, packing);

  Tensor mean = empty_vector(x, s.out_channels), var = empty_vector(x, s.out_channels);
  moments.merge(mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>());
  return {y, mean, var};
}

Tensor conv_pack_cpu(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding,
                     int64_t dilation, int64_t groups) {
  constexpr const char* op = "conv_pack";
  const ConvShape s = check_conv(op, x, weight, stride, padding, dilation, groups);
  const DType dtype = dtype_of(op, x);
  const auto sharing = share_forward(s, dtype, false, true);
  const WeightPacking packing(weight, sharing->plan, dtype, false);
  Tensor packed = new_result({packing.floats()}, ScalarType::Float, MemoryFormat::Contiguous);
  packing.pack_all(packed.mutable_data_ptr<float>());
  return packed;
}

WeightPacking check_packed(const char* op, const Tensor& packed, const Tensor& x,
                           const ConvPlan& plan, DType dtype) {
  check_device(op, "weight", packed, x);
  check(packed.scalar_type() == ScalarType::Float && packed.is_contiguous(), op,
        ": expected packed weight as conv_pack makes it, got ", shape(packed), " of ",
        torch::headeronly::toString(packed.scalar_type()));
  const WeightPacking packing(packed.const_data_ptr<float>(), plan, dtype);
  check(packed.numel() == packing.floats(), op, ": expected packed weight of ", packing.floats(),
        " values, for inputs of this size and this number of threads, got ", packed.numel());
  return packing;
}

Tensor conv_relu_cpu(const Tensor& x, const Tensor& weight, std::vector<int64_t> weight_size,
                     std::optional<Tensor> bias, std::optional<Tensor> residual, bool relu,
                     int64_t stride, int64_t padding, int64_t dilation, int64_t groups) {
  constexpr const char* op = "conv_relu";
  const bool is_packed = weight.dim() == 1;
  const ConvShape s = is_packed ? check_conv(op, x, weight_size, stride, padding, dilation, groups)
                                : check_conv(op, x, weight, stride, padding, dilation, groups);
  check(is_packed || weight.sizes().vec() == weight_size, op,
        ": expected weight of weight_size, got ", shape(weight));
  const DType dtype = dtype_of(op, x);
  const auto sharing = share_forward(s, dtype, false, is_packed);
  const WeightPacking packing = is_packed ? check_packed(op, weight, x, sharing->plan, dtype)
                                          : WeightPacking(weight, sharing->plan, dtype, false);

  Tensor y = new_output(s, x);
  ConvForwardParams p{};
  p.plan = &sharing->plan;
  p.dtype = dtype;
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.past_caches = past_caches(y);
  p.inference = true;
  p.relu = relu;
  if (bias) p.bias = check_vector(op, "bias", *bias, y);
  if (residual) {
    check_like_input(op, "residual", *residual, y);
    p.residual = residual->const_data_ptr();
  }
  forward(p, *sharing, packing);
  return y;
}

Tensor conv_relu_sequence_cpu(const Tensor& x, std::vector<Tensor> packed,
                              std::vector<std::optional<Tensor>> bias, std::vector<int64_t> steps) {
  constexpr const char* op = "conv_relu_sequence";
  constexpr size_t kStepInts = 11;
  const size_t count = packed.size();
  check(count > 0 && bias.size() == count && steps.size() == count * kStepInts, op,
        ": expected a weight, a bias and ", kStepInts, " numbers for each step, got ", count, ", ",
        bias.size(), " and ", steps.size());
  std::vector<std::optional<Tensor>> outputs{x};
  const auto last_reader = [&](int64_t output) {
    size_t last = 0;
    for (size_t i = 0; i < count; ++i)
      if (steps[i * kStepInts] == output || steps[i * kStepInts + 1] == output) last = i;
    return last;
  };
  for (size_t i = 0; i < count; ++i) {
    const int64_t* s = &steps[i * kStepInts];
    const auto [source, residual] = std::pair(s[0], s[1]);
    check(source >= 0 && source <= int64_t(i) && residual >= -1 && residual <= int64_t(i), op,
          ": expected step ", i + 1, " to read what comes before it, got ", source, " and ",
          residual);
    Tensor y = conv_relu_cpu(*outputs[source], packed[i], {s + 3, s + 7}, bias[i],
                             residual < 0 ? std::nullopt : outputs[residual], s[2] != 0, s[7], s[8],
                             s[9], s[10]);
    for (const int64_t read : {source, residual})
      if (read >= 0 && last_reader(read) == i) outputs[read].reset();
    outputs.push_back(std::move(y));
  }
  return *outputs.back();
}

Tensor empty_sums(const Tensor& like, int64_t channels) {
  return torch::stable::empty({2, channels}, ScalarType::Double, std::nullopt, like.device());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_backward_cpu(
    const Tensor& grad, std::optional<Tensor> grad_mask, const Tensor& sums, const Tensor& y,
    const Tensor& mean, const Tensor& var, const Tensor& bn_weight, double eps, bool training,
    const Tensor& x, std::optional<Tensor> x_mean, std::optional<Tensor> x_var,
    std::optional<Tensor> x_weight, std::optional<Tensor> x_bias, double x_eps,
    const Tensor& weight, std::optional<Tensor> addend, std::optional<Tensor> addend_mask,
    int64_t stride, int64_t padding, int64_t dilation, int64_t groups, bool wants_dx) {
  constexpr const char* op = "conv_bn_backward";
  const ConvShape s = check_conv(op, x, weight, stride, padding, dilation, groups);
  check_input(op, y, "y");
  check(y.scalar_type() == x.scalar_type() && y.size(0) == s.batch && y.size(1) == s.out_channels &&
            y.size(2) == s.out_height && y.size(3) == s.out_width,
        op, ": expected y of shape [", s.batch, ", ", s.out_channels, ", ", s.out_height, ", ",
        s.out_width, "] in x's dtype ", torch::headeronly::toString(x.scalar_type()), ", got ",
        shape(y), " of ", torch::headeronly::toString(y.scalar_type()));
  check_like_input(op, "grad", grad, y);
  check(sums.dim() == 2 && sums.size(0) == 2 && sums.size(1) == s.out_channels &&
            sums.is_contiguous() && sums.scalar_type() == ScalarType::Double,
        op, ": expected sums of float64 [2, ", s.out_channels, "], got ", shape(sums), " of ",
        torch::headeronly::toString(sums.scalar_type()));
  const BatchNorm bn = check_batch_norm(op, y, mean, var, bn_weight, nullptr, eps);
  const std::optional<BatchNorm> prologue =
      check_prologue(op, x, x_mean, x_var, x_weight, x_bias, x_eps);
  check(!(prologue && addend), op, ": expected x_mean or addend, not both");
  check(addend || !addend_mask, op, ": expected addend with addend_mask");

  const DType dtype = dtype_of(op, x);
  const int64_t outputs = s.batch * s.out_height * s.out_width;
  Tensor dbn_weight = empty_vector(y, s.out_channels), dbn_bias = empty_vector(y, s.out_channels);
  const double* sum_g = sums.const_data_ptr<double>();
  const Gradient gradient(bn, sum_g, sum_g + s.out_channels, outputs, training,
                          dbn_weight.mutable_data_ptr<float>());
  std::copy(sum_g, sum_g + s.out_channels, dbn_bias.mutable_data_ptr<float>());

  Tensor dx = wants_dx ? new_result_like(x)
                       : torch::stable::empty({0}, x.scalar_type(), std::nullopt, x.device());
  ConvBackwardParams p{};
  p.dtype = dtype;
  p.grad = grad.const_data_ptr();
  if (grad_mask) p.grad_mask = check_mask(op, *grad_mask, y);
  p.y = y.const_data_ptr();
  p.mean = bn.mean;
  p.coefficients = gradient.coefficients();
  p.x = x.const_data_ptr();
  if (prologue) {
    p.scale = prologue->scale.data();
    p.shift = prologue->shift.data();
    p.x_mean = prologue->mean;
  }
  if (addend) {
    check_like_input(op, "addend", *addend, x);
    p.addend = addend->const_data_ptr();
    if (addend_mask) p.addend_mask = check_mask(op, *addend_mask, x);
  }

  const auto sharing = share_backward(s, dtype, prologue.has_value(), wants_dx);
  p.plan = &sharing->plan;
  if (wants_dx) {
    p.dx = dx.mutable_data_ptr();
    p.past_caches = past_caches(dx);
  }
  const WeightPacking packing(weight, sharing->plan, dtype, true);
  WeightGradient dweight(weight, sharing->plan);
  const std::vector<double> x_sums = backward(p, *sharing, packing, dweight);

  Tensor dx_sums = empty_sums(x, prologue && wants_dx ? s.channels : 0);
  double* total = dx_sums.mutable_data_ptr<double>();
  std::fill(total, total + dx_sums.numel(), 0.0);
  for (size_t i = 0; dx_sums.numel() && i < x_sums.size(); ++i)
    total[i % (2 * s.channels)] += x_sums[i];
  return {dx, dweight.tensor(), dbn_weight, dbn_bias, dx_sums};
}

}  // namespace
}  // namespace fastresnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fastresnet, CPU, m) {
  using namespace fastresnet::cpu;
  m.impl("conv_method", TORCH_BOX(&conv_method_cpu));
  m.impl("conv_stats", TORCH_BOX(&conv_stats_cpu));
  m.impl("conv_pack", TORCH_BOX(&conv_pack_cpu));
  m.impl("conv_relu", TORCH_BOX(&conv_relu_cpu));
  m.impl("conv_relu_sequence", TORCH_BOX(&conv_relu_sequence_cpu));
  m.impl("conv_bn_backward", TORCH_BOX(&conv_bn_backward_cpu));
}
