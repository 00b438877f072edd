// SPDX-License-Identifier: Apache-2.0
// The convolutions on CUDA whose neighbours cuDNN computes with them: checks, outputs, workspace,
// and the plan of each problem, made once. What each operator computes is in library.cpp's schemas
// and fastresnet/ops/reference.py; that a problem has no plan is an error here, which
// fastresnet/ops/choice.py expects.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "cuda/conv_graphs.h"
#include "cuda/stream.h"

namespace fastresnet::cuda {
namespace {

struct Convolution {
  int64_t stride, padding, dilation, groups;
};

// One for each thread and device, since handles are not to be shared; never destroyed, since their
// library may be gone by the time that threads end.
cudnn::Handle handle_of(int32_t device) {
  thread_local std::map<int32_t, cudnn::Handle> handles;
  cudnn::Handle& handle = handles[device];
  if (handle == nullptr) cudnn::check_status(cudnn::api().create(&handle), "a handle");
  return handle;
}

// The plan for a problem on a device. Kept until the process ends: there are as many as a program
// has layers of different sizes.
const cudnn::Plan& plan_of(const ConvProblem& problem, int32_t device, cudnn::Handle handle) {
  static std::mutex mutex;
  static auto* plans =
      new std::map<std::pair<int32_t, ConvProblem>, std::unique_ptr<cudnn::Plan>>();
  const std::lock_guard lock(mutex);
  std::unique_ptr<cudnn::Plan>& plan = (*plans)[{device, problem}];
  if (plan == nullptr) plan = make_plan(problem, {handle, ""});
  return *plan;
}

ConvProblem problem_of(const char* op, ConvGraph graph, DType dtype, const std::vector<int64_t>& x,
                       const std::vector<int64_t>& weight, const Convolution& c) {
  check(x.size() == 4 && weight.size() == 4, op,
        ": expected sizes of x [N, C, H, W] and weight [K, C / groups, R, S], got ", x.size(),
        " and ", weight.size(), " of them");
  check(c.stride >= 1 && c.padding >= 0 && c.dilation >= 1 && c.groups >= 1, op,
        ": expected a stride, dilation and groups of 1 or more and a padding of 0 or more, got ",
        c.stride, ", ", c.dilation, ", ", c.groups, ", ", c.padding);
  const ConvProblem p{graph,     dtype,     x[0],     x[1],      x[2],       x[3],    weight[0],
                      weight[2], weight[3], c.stride, c.padding, c.dilation, c.groups};
  check(x[1] == weight[1] * c.groups && weight[0] % c.groups == 0, op, ": expected weight for ",
        x[1], " channels in ", c.groups, " groups, got one of ", weight[0], " x ", weight[1]);
  check(p.out_height() >= 1 && p.out_width() >= 1, op,
        ": expected x of at least the kernel's size, got ", x[2], " x ", x[3]);
  return p;
}

std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// A convolution's weight: of x's dtype, channels_last.
void check_weight(const char* op, const Tensor& weight, const Tensor& x) {
  check(weight.defined() && weight.dim() == 4, op, ": expected weight of 4 dimensions, got ",
        weight.defined() ? shape(weight) : "None");
  check_dtype(op, "weight", weight, x);
  check_channels_last(op, "weight", weight);
  check_device(op, "weight", weight, x);
}

// cuDNN's plans are made for addresses of whole 16 bytes.
void* address(const char* op, const Tensor& t) {
  auto* p = const_cast<void*>(t.const_data_ptr());
  check(reinterpret_cast<uintptr_t>(p) % 16 == 0, op,
        ": expected tensors at addresses of whole 16 bytes");
  return p;
}

// Float32 [count, channels], zero: cuDNN's kernels may add to what they find.
Tensor zero_sums(const char* op, const Tensor& x, int64_t count, int64_t channels) {
  Tensor sums =
      torch::stable::empty({count, channels}, ScalarType::Float, std::nullopt, x.device());
  check_cuda(op, cudaMemsetAsync(sums.mutable_data_ptr<float>(), 0,
                                 sizeof(float) * count * channels, current_stream(op, x)));
  return sums;
}

void execute(const char* op, const ConvProblem& problem, const Tensor& x,
             const std::vector<Tensor>& tensors, const Tensor* sums) {
  const int32_t device = x.get_device_index();
  const cudnn::Handle handle = handle_of(device);
  const cudnn::Plan& plan = plan_of(problem, device, handle);
  std::vector<void*> addresses;
  for (const Tensor& t : tensors) addresses.push_back(address(op, t));
  if (sums != nullptr) {
    for (int64_t i = 0; i < sums->size(0); ++i)
      addresses.push_back(static_cast<float*>(address(op, *sums)) + i * sums->size(1));
  }
  Tensor workspace =
      torch::stable::empty({plan.workspace_bytes()}, ScalarType::Byte, std::nullopt, x.device());
  cudnn::check_status(cudnn::api().set_stream(handle, current_stream(op, x)), "a stream");
  plan.execute(handle, addresses, workspace.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> conv_sums(const Tensor& x, const Tensor& weight, int64_t stride,
                                     int64_t padding, int64_t dilation, int64_t groups) {
  constexpr const char* kOp = "conv_sums";
  check_input(kOp, x);
  check_weight(kOp, weight, x);
  const ConvProblem p = problem_of(kOp, ConvGraph::conv_sums, dtype_of(kOp, x), sizes_of(x),
                                   sizes_of(weight), {stride, padding, dilation, groups});
  const DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty({p.batch, p.out_channels, p.out_height(), p.out_width()},
                                  x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                  MemoryFormat::ChannelsLast);
  Tensor sums = zero_sums(kOp, x, 2, p.out_channels);
  execute(kOp, p, x, {x, weight, y}, &sums);
  return {y, sums};
}

// The problem of a gradient of x, whose sizes `like` has.
ConvProblem dgrad_problem(const char* op, ConvGraph graph, const Tensor& grad, const Tensor& weight,
                          const Tensor& like, const Convolution& c) {
  check_input(op, like);
  check_weight(op, weight, like);
  const ConvProblem p =
      problem_of(op, graph, dtype_of(op, like), sizes_of(like), sizes_of(weight), c);
  check(grad.defined() && grad.dim() == 4 && grad.size(0) == p.batch &&
            grad.size(1) == p.out_channels && grad.size(2) == p.out_height() &&
            grad.size(3) == p.out_width(),
        op, ": expected grad of the convolution's output shape [", p.batch, ", ", p.out_channels,
        ", ", p.out_height(), ", ", p.out_width(), "], got ",
        grad.defined() ? shape(grad) : "None");
  check_dtype(op, "grad", grad, like);
  check_channels_last(op, "grad", grad);
  check_device(op, "grad", grad, like);
  return p;
}

Tensor conv_dgrad_add(const Tensor& grad, const Tensor& weight, const Tensor& addend,
                      int64_t stride, int64_t padding, int64_t dilation, int64_t groups) {
  constexpr const char* kOp = "conv_dgrad_add";
  const ConvProblem p = dgrad_problem(kOp, ConvGraph::conv_dgrad_add, grad, weight, addend,
                                      {stride, padding, dilation, groups});
  const DeviceGuard guard(addend.get_device_index());
  Tensor dx = empty_channels_last(addend);
  execute(kOp, p, addend, {grad, weight, addend, dx}, nullptr);
  return dx;
}

std::tuple<Tensor, Tensor> bn_relu_conv_dgrad(const Tensor& grad, const Tensor& weight,
                                              const Tensor& x, const Tensor& mean,
                                              const Tensor& scale, const Tensor& bias,
                                              int64_t stride, int64_t padding, int64_t dilation,
                                              int64_t groups) {
  constexpr const char* kOp = "bn_relu_conv_dgrad";
  const ConvProblem p = dgrad_problem(kOp, ConvGraph::bn_relu_conv_dgrad, grad, weight, x,
                                      {stride, padding, dilation, groups});
  check_vector(kOp, "mean", mean, x);
  check_vector(kOp, "scale", scale, x);
  check_vector(kOp, "bias", bias, x);
  const DeviceGuard guard(x.get_device_index());
  Tensor dz = empty_channels_last(x);
  Tensor sums = zero_sums(kOp, x, 2, p.channels);
  execute(kOp, p, x, {grad, weight, x, mean, scale, bias, dz}, &sums);
  return {dz, sums};
}

std::tuple<Tensor, Tensor> bn_add_relu_conv_dgrad(const Tensor& grad, const Tensor& weight,
                                                  const Tensor& addend, const Tensor& mask,
                                                  const Tensor& x, const Tensor& mean,
                                                  std::optional<Tensor> residual,
                                                  std::optional<Tensor> residual_mean,
                                                  int64_t stride, int64_t padding, int64_t dilation,
                                                  int64_t groups) {
  constexpr const char* kOp = "bn_add_relu_conv_dgrad";
  const bool dual = residual.has_value();
  const ConvProblem p = dgrad_problem(
      kOp, dual ? ConvGraph::bn_add_bn_relu_conv_dgrad : ConvGraph::bn_add_relu_conv_dgrad, grad,
      weight, x, {stride, padding, dilation, groups});
  check_like_input(kOp, "addend", addend, x);
  check_mask(kOp, mask, x);
  check_vector(kOp, "mean", mean, x);
  check(dual == residual_mean.has_value(), kOp,
        ": expected residual and residual_mean, or neither");
  std::vector<Tensor> tensors{grad, weight, addend, mask, x, mean};
  if (dual) {
    check_like_input(kOp, "residual", *residual, x);
    check_vector(kOp, "residual_mean", *residual_mean, x);
    tensors.push_back(*residual);
    tensors.push_back(*residual_mean);
  }
  const DeviceGuard guard(x.get_device_index());
  Tensor dz = empty_channels_last(x);
  tensors.push_back(dz);
  Tensor sums = zero_sums(kOp, x, dual ? 3 : 2, p.channels);
  execute(kOp, p, x, tensors, &sums);
  return {dz, sums};
}

ConvGraph graph_named(const std::string& name) {
  const std::map<std::string, ConvGraph> names{
      {"conv_sums", ConvGraph::conv_sums},
      {"conv_dgrad_add", ConvGraph::conv_dgrad_add},
      {"bn_relu_conv_dgrad", ConvGraph::bn_relu_conv_dgrad},
      {"bn_add_relu_conv_dgrad", ConvGraph::bn_add_relu_conv_dgrad},
      {"bn_add_bn_relu_conv_dgrad", ConvGraph::bn_add_bn_relu_conv_dgrad},
  };
  const auto found = names.find(name);
  check(found != names.end(), "conv_engine: expected the name of a graph, got ", name);
  return found->second;
}

DType dtype_of_scalar(ScalarType type) {
  check(type == ScalarType::BFloat16 || type == ScalarType::Half,
        "conv_engine: expected bfloat16 or float16, got ", torch::headeronly::toString(type));
  return type == ScalarType::BFloat16 ? DType::bfloat16 : DType::float16;
}

std::string conv_engine(std::string graph, std::vector<int64_t> x_size,
                        std::vector<int64_t> weight_size, int64_t stride, int64_t padding,
                        int64_t dilation, int64_t groups, ScalarType dtype, std::string device) {
  const ConvProblem p = problem_of("conv_engine", graph_named(graph), dtype_of_scalar(dtype),
                                   x_size, weight_size, {stride, padding, dilation, groups});
  return make_plan(p, {nullptr, device})->engine();
}

int64_t cudnn_version() { return static_cast<int64_t>(cudnn::api().get_version()); }

}  // namespace
}  // namespace fastresnet::cuda

STABLE_TORCH_LIBRARY_IMPL(fastresnet, CUDA, m) {
  m.impl("conv_sums", TORCH_BOX(&fastresnet::cuda::conv_sums));
  m.impl("conv_dgrad_add", TORCH_BOX(&fastresnet::cuda::conv_dgrad_add));
  m.impl("bn_relu_conv_dgrad", TORCH_BOX(&fastresnet::cuda::bn_relu_conv_dgrad));
  m.impl("bn_add_relu_conv_dgrad", TORCH_BOX(&fastresnet::cuda::bn_add_relu_conv_dgrad));
}

STABLE_TORCH_LIBRARY_IMPL(fastresnet, CompositeExplicitAutograd, m) {
  m.impl("conv_engine", TORCH_BOX(&fastresnet::cuda::conv_engine));
  m.impl("cudnn_version", TORCH_BOX(&fastresnet::cuda::cudnn_version));
}
