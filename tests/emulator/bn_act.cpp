// SPDX-License-Identifier: Apache-2.0
// The launches of csrc/cuda/bn_act.cuh, callable from Python through ctypes. Vectors of one batch
// norm come as four pointers: mean, var, weight, bias.
#include "cuda/bn_act.cuh"

namespace {

using namespace fastresnet;
using namespace fastresnet::cuda;

Queue queue_of(int multiprocessors) { return {nullptr, multiprocessors}; }

Normalisation normalisation(float* const* vectors, float eps) {
  return {vectors[0], vectors[1], vectors[2], vectors[3], eps};
}

}  // namespace

extern "C" {

int64_t bn_workspace(int64_t rows, int64_t channels, int multiprocessors) {
  return bn_workspace_bytes(rows, channels, queue_of(multiprocessors));
}

void bn_stats(DType dtype, int64_t rows, int64_t channels, int multiprocessors, const void* x,
              const float* sums, float* mean, float* var, void* workspace) {
  const StatsParams p{x, sums, mean, var, {rows, channels, 0}, dtype};
  launch_bn_stats(p, workspace, queue_of(multiprocessors));
}

void bn_forward(DType dtype, Epilogue epilogue, int64_t rows, int64_t channels, int multiprocessors,
                const void* x, float* const* norm, float eps, const void* residual,
                float* const* residual_norm, float residual_eps, void* out, uint8_t* mask) {
  const ForwardParams p{.x = x,
                        .norm = normalisation(norm, eps),
                        .residual = residual,
                        .residual_norm = normalisation(residual_norm, residual_eps),
                        .out = out,
                        .mask = mask,
                        .extent = {rows, channels, 0},
                        .dtype = dtype,
                        .epilogue = epilogue};
  launch_bn_forward(p, queue_of(multiprocessors));
}

void bn_backward(DType dtype, Epilogue epilogue, bool training, int64_t rows, int64_t channels,
                 int multiprocessors, const void* grad, const void* shortcut_grad,
                 const uint8_t* mask, const void* x, float* const* norm, float eps,
                 const void* residual, float* const* residual_norm, float residual_eps, void* dx,
                 void* dresidual, float* dweight, float* dbias, float* dresidual_weight,
                 void* masked_grad, float* sums, void* workspace) {
  const BackwardParams p{.grad = grad,
                         .shortcut_grad = shortcut_grad,
                         .mask = mask,
                         .x = x,
                         .norm = normalisation(norm, eps),
                         .residual = residual,
                         .residual_norm = normalisation(residual_norm, residual_eps),
                         .masked_grad = epilogue == Epilogue::add_relu ? dresidual : masked_grad,
                         .dx = dx,
                         .dresidual = dresidual,
                         .dweight = dweight,
                         .dbias = dbias,
                         .dresidual_weight = dresidual_weight,
                         .sum_gx = sums,
                         .sum_gr = sums + channels,
                         .extent = {rows, channels, 0},
                         .dtype = dtype,
                         .epilogue = epilogue,
                         .training = training};
  // Without scratch memory the sums are given, and the gradient is masked.
  if (workspace == nullptr)
    launch_bn_backward_apply(p, queue_of(multiprocessors));
  else
    launch_bn_backward(p, workspace, queue_of(multiprocessors));
}

void bn_scale(int64_t channels, const float* var, const float* weight, float eps, float* scale) {
  launch_bn_scale({var, weight, scale, channels, eps}, queue_of(1));
}
}
