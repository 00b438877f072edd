// SPDX-License-Identifier: Apache-2.0
// The batch-norm operators on CUDA: checks, outputs, scratch memory, and the launches of
// bn_act.cuh on torch's current stream. What each operator computes is in library.cpp's schemas and
// fastresnet/ops/reference.py.
#include "cuda/bn_act.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "check.h"
#include "cuda/entry.h"

namespace fastresnet::cuda {
namespace {

Tensor empty_mask(const Tensor& x) {
  return torch::stable::empty({x.size(0), x.size(2), x.size(3), mask_bytes(x.size(1))},
                              ScalarType::Byte, std::nullopt, x.device());
}

// `sums` are float32 [count, C], as a convolution's kernel leaves them.
const float* check_sums(const char* op, const Tensor& sums, const Tensor& x, int64_t count) {
  check(sums.defined() && sums.dim() == 2 && sums.size(0) == count && sums.size(1) == x.size(1) &&
            sums.is_contiguous() && sums.scalar_type() == ScalarType::Float &&
            sums.device() == x.device(),
        op, ": expected sums of float32 [", count, ", ", x.size(1), "] beside x, got ",
        sums.defined() ? shape(sums) : "None");
  return sums.const_data_ptr<float>();
}

std::tuple<Tensor, Tensor> stats(const char* op, const Tensor& x, const float* sums) {
  const DeviceGuard guard(x.get_device_index());
  const Queue queue = current_queue(op, x);
  Tensor mean = empty_vector(x, x.size(1));
  Tensor var = empty_vector(x, x.size(1));
  StatsParams p{};
  p.x = x.const_data_ptr();
  p.sums = sums;
  p.mean = mean.mutable_data_ptr<float>();
  p.var = var.mutable_data_ptr<float>();
  p.extent = extent_of(x);
  p.dtype = dtype_of(op, x);
  Tensor workspace = empty_bytes(x, bn_workspace_bytes(p.extent.rows, p.extent.channels, queue));
  check_cuda(op, launch_bn_stats(p, workspace.mutable_data_ptr(), queue));
  return {mean, var};
}

std::tuple<Tensor, Tensor> bn_stats(const Tensor& x) {
  check_input("bn_stats", x);
  return stats("bn_stats", x, nullptr);
}

std::tuple<Tensor, Tensor> bn_stats_of_sums(const Tensor& x, const Tensor& sums) {
  constexpr const char* kOp = "bn_stats_of_sums";
  check_input(kOp, x);
  return stats(kOp, x, check_sums(kOp, sums, x, 2));
}

Tensor bn_scale(const Tensor& var, const Tensor& weight, double eps) {
  constexpr const char* kOp = "bn_scale";
  for (const Tensor* t : {&var, &weight})
    check(t->defined() && t->dim() == 1 && t->size(0) == var.size(0) && t->is_contiguous() &&
              t->scalar_type() == ScalarType::Float && t->device() == var.device(),
          kOp, ": expected var and weight of float32, as many values each, on one device");
  const DeviceGuard guard(var.get_device_index());
  Tensor scale = empty_vector(var, var.size(0));
  const ScaleParams p{var.const_data_ptr<float>(), weight.const_data_ptr<float>(),
                      scale.mutable_data_ptr<float>(), var.size(0), static_cast<float>(eps)};
  if (p.channels > 0) check_cuda(kOp, launch_bn_scale(p, current_queue(kOp, var)));
  return scale;
}

struct Forward {
  Tensor out, mask;
};

// `residual` is null for bn and bn_relu, `residual_norm` for all but bn_add_bn_relu.
Forward forward(const char* op, Epilogue epilogue, const Tensor& x,
                const NormalisationTensors& norm, const Tensor* residual = nullptr,
                const NormalisationTensors* residual_norm = nullptr) {
  check_input(op, x);
  ForwardParams p{};
  p.norm = norm.checked(op, x);
  if (residual != nullptr) {
    check_like_input(op, "residual", *residual, x);
    p.residual = residual->const_data_ptr();
  }
  if (residual_norm != nullptr) p.residual_norm = residual_norm->checked(op, x);
  const DeviceGuard guard(x.get_device_index());
  Forward result;
  result.out = empty_channels_last(x);
  p.out = result.out.mutable_data_ptr();
  if (has_residual(epilogue)) {
    result.mask = empty_mask(x);
    p.mask = result.mask.mutable_data_ptr<uint8_t>();
  }
  p.x = x.const_data_ptr();
  p.extent = extent_of(x);
  p.dtype = dtype_of(op, x);
  p.epilogue = epilogue;
  check_cuda(op, launch_bn_forward(p, current_queue(op, x)));
  return result;
}

Tensor bn(const Tensor& x, const Tensor& mean, const Tensor& var, const Tensor& weight,
          const Tensor& bias, double eps, bool /*training*/) {
  return forward("bn", Epilogue::none, x, {mean, var, weight, &bias, eps}).out;
}

Tensor bn_relu(const Tensor& x, const Tensor& mean, const Tensor& var, const Tensor& weight,
               const Tensor& bias, double eps, bool /*training*/) {
  return forward("bn_relu", Epilogue::relu, x, {mean, var, weight, &bias, eps}).out;
}

std::tuple<Tensor, Tensor> bn_add_relu(const Tensor& x, const Tensor& mean, const Tensor& var,
                                       const Tensor& weight, const Tensor& bias,
                                       const Tensor& residual, double eps, bool /*training*/) {
  auto [out, mask] =
      forward("bn_add_relu", Epilogue::add_relu, x, {mean, var, weight, &bias, eps}, &residual);
  return {out, mask};
}

std::tuple<Tensor, Tensor> bn_add_bn_relu(const Tensor& x, const Tensor& mean, const Tensor& var,
                                          const Tensor& weight, const Tensor& bias,
                                          const Tensor& residual, const Tensor& residual_mean,
                                          const Tensor& residual_var, const Tensor& residual_weight,
                                          const Tensor& residual_bias, double eps,
                                          double residual_eps, bool /*training*/) {
  const NormalisationTensors residual_norm{residual_mean,  residual_var, residual_weight,
                                           &residual_bias, residual_eps, "residual_"};
  auto [out, mask] = forward("bn_add_bn_relu", Epilogue::add_bn_relu, x,
                             {mean, var, weight, &bias, eps}, &residual, &residual_norm);
  return {out, mask};
}

struct Backward {
  Tensor dx, dweight, dbias, dresidual, dresidual_weight;
};

// `shortcut_grad` is null where there is one gradient, `mask` for bn and bn_relu, `residual` and
// `residual_norm` for all but bn_add_bn_relu.
Backward backward(const char* op, Epilogue epilogue, const Tensor& grad,
                  const Tensor* shortcut_grad, const Tensor* mask, const Tensor& x,
                  const NormalisationTensors& norm, bool training, const Tensor* residual = nullptr,
                  const NormalisationTensors* residual_norm = nullptr) {
  check_input(op, x);
  check_like_input(op, "grad", grad, x);
  BackwardParams p{};
  if (shortcut_grad != nullptr) {
    check_like_input(op, "shortcut_grad", *shortcut_grad, x);
    p.shortcut_grad = shortcut_grad->const_data_ptr();
  }
  p.norm = norm.checked(op, x);
  if (mask != nullptr) p.mask = check_mask(op, *mask, x);
  if (residual != nullptr) {
    check_like_input(op, "residual", *residual, x);
    p.residual = residual->const_data_ptr();
    p.residual_norm = residual_norm->checked(op, x);
  }
  const DeviceGuard guard(x.get_device_index());
  const Queue queue = current_queue(op, x);
  const int64_t channels = x.size(1);

  Backward result;
  result.dx = empty_channels_last(x);
  result.dweight = empty_vector(x, channels);
  result.dbias = empty_vector(x, channels);
  p.dx = result.dx.mutable_data_ptr();
  p.dweight = result.dweight.mutable_data_ptr<float>();
  p.dbias = result.dbias.mutable_data_ptr<float>();
  Tensor masked_grad;
  if (has_residual(epilogue)) {
    result.dresidual = empty_channels_last(x);
    masked_grad = residual_norm == nullptr ? result.dresidual : empty_channels_last(x);
    p.masked_grad = masked_grad.mutable_data_ptr();
  }
  if (residual_norm != nullptr) {
    p.dresidual = result.dresidual.mutable_data_ptr();
    result.dresidual_weight = empty_vector(x, channels);
    p.dresidual_weight = result.dresidual_weight.mutable_data_ptr<float>();
  }
  Tensor sums = empty_vector(x, 2 * channels);
  p.sum_gx = sums.mutable_data_ptr<float>();
  p.sum_gr = p.sum_gx + channels;

  p.grad = grad.const_data_ptr();
  p.x = x.const_data_ptr();
  p.extent = extent_of(x);
  p.dtype = dtype_of(op, x);
  p.epilogue = epilogue;
  p.training = training;
  Tensor workspace = empty_bytes(x, bn_workspace_bytes(p.extent.rows, channels, queue));
  check_cuda(op, launch_bn_backward(p, workspace.mutable_data_ptr(), queue));
  return result;
}

std::tuple<Tensor, Tensor, Tensor> bn_backward(const Tensor& grad, const Tensor& x,
                                               const Tensor& mean, const Tensor& var,
                                               const Tensor& weight, double eps, bool training) {
  auto r = backward("bn_backward", Epilogue::none, grad, nullptr, nullptr, x,
                    {mean, var, weight, nullptr, eps}, training);
  return {r.dx, r.dweight, r.dbias};
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_backward(const Tensor& grad, const Tensor& x,
                                                    const Tensor& mean, const Tensor& var,
                                                    const Tensor& weight, const Tensor& bias,
                                                    double eps, bool training) {
  auto r = backward("bn_relu_backward", Epilogue::relu, grad, nullptr, nullptr, x,
                    {mean, var, weight, &bias, eps}, training);
  return {r.dx, r.dweight, r.dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_relu_backward(
    const Tensor& grad, const Tensor& mask, const Tensor& x, const Tensor& mean, const Tensor& var,
    const Tensor& weight, double eps, bool training) {
  auto r = backward("bn_add_relu_backward", Epilogue::add_relu, grad, nullptr, &mask, x,
                    {mean, var, weight, nullptr, eps}, training);
  return {r.dx, r.dweight, r.dbias, r.dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_relu_fork_backward(
    const Tensor& grad, const Tensor& shortcut_grad, const Tensor& mask, const Tensor& x,
    const Tensor& mean, const Tensor& var, const Tensor& weight, double eps, bool training) {
  auto r = backward("bn_add_relu_fork_backward", Epilogue::add_relu, grad, &shortcut_grad, &mask, x,
                    {mean, var, weight, nullptr, eps}, training);
  return {r.dx, r.dweight, r.dbias, r.dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_bn_relu_backward(
    const Tensor& grad, const Tensor& mask, const Tensor& x, const Tensor& mean, const Tensor& var,
    const Tensor& weight, const Tensor& residual, const Tensor& residual_mean,
    const Tensor& residual_var, const Tensor& residual_weight, double eps, double residual_eps,
    bool training) {
  const NormalisationTensors residual_norm{residual_mean, residual_var, residual_weight,
                                           nullptr,       residual_eps, "residual_"};
  auto r = backward("bn_add_bn_relu_backward", Epilogue::add_bn_relu, grad, nullptr, &mask, x,
                    {mean, var, weight, nullptr, eps}, training, &residual, &residual_norm);
  return {r.dx, r.dweight, r.dbias, r.dresidual, r.dresidual_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_bn_relu_fork_backward(
    const Tensor& grad, const Tensor& shortcut_grad, const Tensor& mask, const Tensor& x,
    const Tensor& mean, const Tensor& var, const Tensor& weight, const Tensor& residual,
    const Tensor& residual_mean, const Tensor& residual_var, const Tensor& residual_weight,
    double eps, double residual_eps, bool training) {
  const NormalisationTensors residual_norm{residual_mean, residual_var, residual_weight,
                                           nullptr,       residual_eps, "residual_"};
  auto r =
      backward("bn_add_bn_relu_fork_backward", Epilogue::add_bn_relu, grad, &shortcut_grad, &mask,
               x, {mean, var, weight, nullptr, eps}, training, &residual, &residual_norm);
  return {r.dx, r.dweight, r.dbias, r.dresidual, r.dresidual_weight};
}

// The second pass alone: dz, the gradient behind the batch norm, and its sums are there.
std::tuple<Tensor, Tensor> bn_backward_of_sums(const Tensor& dz, const Tensor& sums,
                                               const Tensor& x, const Tensor& mean,
                                               const Tensor& var, const Tensor& weight, double eps,
                                               bool training) {
  constexpr const char* kOp = "bn_backward_of_sums";
  check_input(kOp, x);
  check_like_input(kOp, "dz", dz, x);
  BackwardParams p{};
  p.norm = NormalisationTensors{mean, var, weight, nullptr, eps}.checked(kOp, x);
  // The kernel only reads them, under names that the first pass writes.
  auto* sum_g = const_cast<float*>(check_sums(kOp, sums, x, 2));
  const DeviceGuard guard(x.get_device_index());
  Tensor dx = empty_channels_last(x), dweight = empty_vector(x, x.size(1));
  p.grad = dz.const_data_ptr();
  p.x = x.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr<float>();
  p.dbias = sum_g;
  p.sum_gx = sum_g + x.size(1);
  p.extent = extent_of(x);
  p.dtype = dtype_of(kOp, x);
  p.epilogue = Epilogue::none;
  p.training = training;
  check_cuda(kOp, launch_bn_backward_apply(p, current_queue(kOp, x)));
  return {dx, dweight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_bn_backward_of_sums(
    const Tensor& dz, const Tensor& sums, const Tensor& x, const Tensor& mean, const Tensor& var,
    const Tensor& weight, const Tensor& residual, const Tensor& residual_mean,
    const Tensor& residual_var, const Tensor& residual_weight, double eps, double residual_eps,
    bool training) {
  constexpr const char* kOp = "bn_add_bn_backward_of_sums";
  check_input(kOp, x);
  check_like_input(kOp, "dz", dz, x);
  check_like_input(kOp, "residual", residual, x);
  BackwardParams p{};
  p.norm = NormalisationTensors{mean, var, weight, nullptr, eps}.checked(kOp, x);
  p.residual_norm = NormalisationTensors{residual_mean, residual_var, residual_weight,
                                         nullptr,       residual_eps, "residual_"}
                        .checked(kOp, x);
  auto* sum_g = const_cast<float*>(check_sums(kOp, sums, x, 3));
  const DeviceGuard guard(x.get_device_index());
  Tensor dx = empty_channels_last(x), dresidual = empty_channels_last(x);
  Tensor dweight = empty_vector(x, x.size(1)), dresidual_weight = empty_vector(x, x.size(1));
  p.masked_grad = const_cast<void*>(dz.const_data_ptr());  // likewise
  p.x = x.const_data_ptr();
  p.residual = residual.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  p.dresidual = dresidual.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr<float>();
  p.dresidual_weight = dresidual_weight.mutable_data_ptr<float>();
  p.dbias = sum_g;
  p.sum_gx = sum_g + x.size(1);
  p.sum_gr = p.sum_gx + x.size(1);
  p.extent = extent_of(x);
  p.dtype = dtype_of(kOp, x);
  p.epilogue = Epilogue::add_bn_relu;
  p.training = training;
  check_cuda(kOp, launch_bn_backward_apply(p, current_queue(kOp, x)));
  return {dx, dweight, dresidual, dresidual_weight};
}

}  // namespace
}  // namespace fastresnet::cuda

STABLE_TORCH_LIBRARY_IMPL(fastresnet, CUDA, m) {
  m.impl("bn_stats", TORCH_BOX(&fastresnet::cuda::bn_stats));
  m.impl("bn_stats_of_sums", TORCH_BOX(&fastresnet::cuda::bn_stats_of_sums));
  m.impl("bn_scale", TORCH_BOX(&fastresnet::cuda::bn_scale));
  m.impl("bn_backward_of_sums", TORCH_BOX(&fastresnet::cuda::bn_backward_of_sums));
  m.impl("bn_add_bn_backward_of_sums", TORCH_BOX(&fastresnet::cuda::bn_add_bn_backward_of_sums));
  m.impl("bn", TORCH_BOX(&fastresnet::cuda::bn));
  m.impl("bn_relu", TORCH_BOX(&fastresnet::cuda::bn_relu));
  m.impl("bn_add_relu", TORCH_BOX(&fastresnet::cuda::bn_add_relu));
  m.impl("bn_add_bn_relu", TORCH_BOX(&fastresnet::cuda::bn_add_bn_relu));
  m.impl("bn_backward", TORCH_BOX(&fastresnet::cuda::bn_backward));
  m.impl("bn_relu_backward", TORCH_BOX(&fastresnet::cuda::bn_relu_backward));
  m.impl("bn_add_relu_backward", TORCH_BOX(&fastresnet::cuda::bn_add_relu_backward));
  m.impl("bn_add_bn_relu_backward", TORCH_BOX(&fastresnet::cuda::bn_add_bn_relu_backward));
  m.impl("bn_add_relu_fork_backward", TORCH_BOX(&fastresnet::cuda::bn_add_relu_fork_backward));
  m.impl("bn_add_bn_relu_fork_backward",
         TORCH_BOX(&fastresnet::cuda::bn_add_bn_relu_fork_backward));
}
