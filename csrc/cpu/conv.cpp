// SPDX-License-Identifier: Apache-2.0
// The CPU entries of the convolutions: tensors in, checks, a plan, packed weights, the kernels of
// the ISA level in use over the threads' blocks. The loops are in kernels/conv-inl.h.
#include <torch/csrc/stable/library.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "batch_norm.h"
#include "check.h"
#include "cpu/bn_vectors.h"
#include "cpu/conv_params.h"
#include "cpu/isa.h"

namespace fastresnet::cpu {
namespace {

// Memory of a thread that stays from call to call: fresh pages would cost more than the kernels
// save. It is as large as the largest call needed.
class Scratch {
 public:
  float* floats(int64_t count) {
    if (count > size_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, bytes(count))));
      check(memory_ != nullptr, "out of memory: ", bytes(count), " bytes of scratch");
      std::fill(memory_.get(), memory_.get() + count, 0.0f);
      size_ = count;
    }
    return memory_.get();
  }

 private:
  static constexpr int64_t kAlignment = 4096;
  static int64_t bytes(int64_t count) {
    return (count * int64_t{sizeof(float)} + kAlignment - 1) / kAlignment * kAlignment;
  }
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

int64_t threads() { return torch::stable::get_num_threads(); }

// body(part) for every part, which must not throw.
template <class Body>
void parallel(int64_t parts, Body body) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i);
  });
}

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                    int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

ConvShape check_conv(const char* op, const Tensor& x, const Tensor& weight, int64_t stride,
                     int64_t padding, int64_t dilation) {
  check_input(op, x);
  check(weight.defined() && weight.dim() == 4 && weight.size(1) == x.size(1) && weight.numel() > 0,
        op, ": expected weight of shape [out_channels, ", x.size(1), ", height, width], got ",
        weight.defined() ? shape(weight) : "None");
  dtype_of(op, weight);
  check(weight.device() == x.device(), op, ": expected weight and x on one device");
  check(stride >= 1 && stride <= kMaxStride, op, ": expected a stride of 1 to ", kMaxStride,
        ", got ", stride);
  check(padding >= 0 && dilation >= 1, op, ": expected padding >= 0 and dilation >= 1, got ",
        padding, " and ", dilation);
  ConvShape s{x.size(0),      x.size(2),      x.size(3),      x.size(1), 0,       0,
              weight.size(0), weight.size(2), weight.size(3), stride,    padding, dilation};
  s.out_height = output_size(s.height, s.kernel_height, stride, padding, dilation);
  s.out_width = output_size(s.width, s.kernel_width, stride, padding, dilation);
  check(s.height + 2 * padding >= dilation * (s.kernel_height - 1) + 1 &&
            s.width + 2 * padding >= dilation * (s.kernel_width - 1) + 1,
        op, ": expected x of at least the kernel's size, got ", shape(x), " and ", shape(weight));
  return s;
}

// Staged pixels of a block share the second-level cache with weights, results and their sources.
int64_t second_level_cache() {
  static const int64_t bytes = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 512 * 1024);
  return bytes;
}

int64_t padded(int64_t channels) { return channel_blocks(channels) * kChannelBlock; }

// Bytes of one staged pixel of so many channels.
int64_t staged_bytes(int64_t channels, DType dtype) {
  constexpr int64_t kLineBytes = 64;
  return padded(channels) / kernels().conv_line_channels(dtype) * kLineBytes;
}

ConvPlan forward_plan(const ConvShape& s, DType dtype) {
  const int64_t phases = std::min(s.stride * s.stride, s.kernel_height * s.kernel_width);
  return ConvPlan(s, phases * staged_bytes(s.channels, dtype), second_level_cache() / 4, threads());
}

ConvPlan backward_plan(const ConvShape& s, DType dtype) {
  const int64_t phases = std::min(s.stride * s.stride, s.kernel_height * s.kernel_width);
  return ConvPlan(s, phases * staged_bytes(s.channels, dtype) + staged_bytes(s.out_channels, dtype),
                  second_level_cache() / 4, threads());
}

// The weight in the order in which the kernels read it, in the calling thread's memory.
const float* pack(const Tensor& weight, const ConvPlan& plan, DType dtype, bool transposed) {
  static thread_local Scratch scratch;
  const ConvShape& s = plan.shape;
  const KernelTable& table = kernels();
  const int64_t columns = transposed ? s.channels : s.out_channels;
  const int64_t depth = transposed ? s.out_channels : s.channels;
  const int64_t elements = padded(depth) * 16 / table.conv_line_channels(dtype);
  const int64_t block = s.kernel_height * s.kernel_width * elements * kChannelBlock;
  const int64_t blocks = channel_blocks(columns);
  float* packed = scratch.floats(blocks * block);
  const ConvWeight view{weight.const_data_ptr(),
                        dtype_of("conv", weight),
                        {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}};
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      table.conv_pack(view, plan, dtype, transposed, i, packed + i * block);
  });
  return packed;
}

float* thread_scratch(int64_t floats) {
  static thread_local Scratch scratch;
  return scratch.floats(floats);
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
  return check_batch_norm(op, x, *mean, *var, *weight, &*bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> conv_stats_cpu(const Tensor& x, std::optional<Tensor> x_mean,
                                                  std::optional<Tensor> x_var,
                                                  std::optional<Tensor> x_weight,
                                                  std::optional<Tensor> x_bias, double x_eps,
                                                  const Tensor& weight, int64_t stride,
                                                  int64_t padding, int64_t dilation) {
  constexpr const char* op = "conv_stats";
  const ConvShape s = check_conv(op, x, weight, stride, padding, dilation);
  const std::optional<BatchNorm> prologue =
      check_prologue(op, x, x_mean, x_var, x_weight, x_bias, x_eps);
  const DType dtype = dtype_of(op, x);
  const ConvPlan plan = forward_plan(s, dtype);
  const KernelTable& table = kernels();

  Tensor y =
      torch::stable::empty({s.batch, s.out_channels, s.out_height, s.out_width}, x.scalar_type(),
                           std::nullopt, x.device(), std::nullopt, MemoryFormat::ChannelsLast);
  ConvForwardParams p{};
  p.plan = &plan;
  p.dtype = dtype;
  p.x = x.const_data_ptr();
  if (prologue) {
    p.scale = prologue->scale.data();
    p.shift = prologue->shift.data();
  }
  p.weight = pack(weight, plan, dtype, false);
  p.y = y.mutable_data_ptr();

  const int64_t parts = std::min(threads(), plan.blocks);
  const int64_t scratch = table.conv_forward_scratch(plan, dtype);
  std::vector<double> moments(parts * 2 * s.out_channels);
  parallel(parts, [&](int64_t part) {
    double* mean = &moments[part * 2 * s.out_channels];
    table.conv_forward(p, plan.blocks * part / parts, plan.blocks * (part + 1) / parts,
                       thread_scratch(scratch), mean, mean + s.out_channels);
  });

  Tensor mean = empty_vector(x, s.out_channels), var = empty_vector(x, s.out_channels);
  std::vector<double> counts(parts);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = plan.blocks * part / parts; i < plan.blocks * (part + 1) / parts; ++i)
      counts[part] += static_cast<double>(plan.outputs(plan.block(i)));
  for (int64_t c = 0; c < s.out_channels; ++c) {
    Moments<double> total{0, 0, 0};
    for (int64_t part = 0; part < parts; ++part) {
      const double* of_part = &moments[part * 2 * s.out_channels];
      total = merge(total, {counts[part], of_part[c], of_part[s.out_channels + c]});
    }
    mean.mutable_data_ptr<float>()[c] = static_cast<float>(total.mean);
    var.mutable_data_ptr<float>()[c] = static_cast<float>(total.biased_variance());
  }
  return {y, mean, var};
}

// The threads' shares of the gradient of the weight, [parts, out blocks, in blocks, taps, 32, 32],
// added up in the order of the parts into the weight's own layout.
template <class W>
void reduce_weight_gradient(const ConvPlan& plan, const float* shares, int64_t parts, Tensor& out) {
  const ConvShape& s = plan.shape;
  const int64_t in_blocks = channel_blocks(s.channels), out_blocks = channel_blocks(s.out_channels);
  const int64_t taps = static_cast<int64_t>(plan.taps.size());
  constexpr int64_t kTile = kChannelBlock * kChannelBlock;
  const int64_t size = out_blocks * in_blocks * taps * kTile;
  W* data = out.mutable_data_ptr<W>();
  const int64_t strides[] = {out.stride(0), out.stride(1), out.stride(2), out.stride(3)};
  torch::stable::parallel_for(0, out_blocks * in_blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t n0 = i / in_blocks * kChannelBlock, c0 = i % in_blocks * kChannelBlock;
        const int64_t rows = std::min(kChannelBlock, s.out_channels - n0);
        const int64_t columns = std::min(kChannelBlock, s.channels - c0);
        const int64_t tap = plan.taps[t].weight;
        W* to = data + n0 * strides[0] + c0 * strides[1] + tap / s.kernel_width * strides[2] +
                tap % s.kernel_width * strides[3];
        for (int64_t n = 0; n < rows; ++n) {
          const float* share = shares + (i * taps + t) * kTile + n * kChannelBlock;
          float total[kChannelBlock];
          std::copy(share, share + kChannelBlock, total);
          for (int64_t part = 1; part < parts; ++part)
            for (int64_t c = 0; c < kChannelBlock; ++c) total[c] += share[part * size + c];
          for (int64_t c = 0; c < columns; ++c)
            to[n * strides[0] + c * strides[1]] = static_cast<W>(total[c]);
        }
      }
  });
}

Tensor empty_like_weight(const Tensor& weight) {
  const bool nhwc = is_channels_last(weight) && !weight.is_contiguous();
  return torch::stable::empty(weight.sizes(), weight.scalar_type(), std::nullopt, weight.device(),
                              std::nullopt,
                              nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
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
    int64_t stride, int64_t padding, int64_t dilation, bool wants_dx) {
  constexpr const char* op = "conv_bn_backward";
  const ConvShape s = check_conv(op, x, weight, stride, padding, dilation);
  check_input(op, y);
  check(y.scalar_type() == x.scalar_type() && y.size(0) == s.batch && y.size(1) == s.out_channels &&
            y.size(2) == s.out_height && y.size(3) == s.out_width,
        op, ": expected y as conv_stats returned it, got ", shape(y));
  check_like_input(op, "grad", grad, y);
  check(sums.dim() == 2 && sums.size(0) == 2 && sums.size(1) == s.out_channels &&
            sums.is_contiguous() && sums.scalar_type() == ScalarType::Double,
        op, ": expected sums of float64 [2, ", s.out_channels, "], got ", shape(sums));
  const BatchNorm bn = check_batch_norm(op, y, mean, var, bn_weight, nullptr, eps);
  const std::optional<BatchNorm> prologue =
      check_prologue(op, x, x_mean, x_var, x_weight, x_bias, x_eps);
  check(!(prologue && addend), op, ": expected x_mean or addend, not both");
  check(addend || !addend_mask, op, ": expected addend with addend_mask");

  const DType dtype = dtype_of(op, x);
  const ConvPlan plan = backward_plan(s, dtype);
  const KernelTable& table = kernels();
  const int64_t outputs = s.batch * s.out_height * s.out_width;
  Tensor dbn_weight = empty_vector(y, s.out_channels), dbn_bias = empty_vector(y, s.out_channels);
  const double* sum_g = sums.const_data_ptr<double>();
  const Gradient gradient(bn, sum_g, sum_g + s.out_channels, outputs, training,
                          dbn_weight.mutable_data_ptr<float>());
  std::copy(sum_g, sum_g + s.out_channels, dbn_bias.mutable_data_ptr<float>());

  Tensor dx = wants_dx ? empty_channels_last(x)
                       : torch::stable::empty({0}, x.scalar_type(), std::nullopt, x.device());
  ConvBackwardParams p{};
  p.plan = &plan;
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
  if (wants_dx) {
    p.weight = pack(weight, plan, dtype, true);
    p.dx = dx.mutable_data_ptr();
  }

  static thread_local Scratch shares_scratch;
  const int64_t parts = std::min(threads(), plan.blocks);
  const int64_t scratch = table.conv_backward_scratch(plan, dtype);
  const int64_t share =
      padded(s.out_channels) * padded(s.channels) * static_cast<int64_t>(plan.taps.size());
  float* shares = shares_scratch.floats(parts * share);
  std::vector<double> x_sums(parts * 2 * s.channels);
  parallel(parts, [&](int64_t part) {
    std::fill(shares + part * share, shares + (part + 1) * share, 0.0f);
    table.conv_backward(p, plan.blocks * part / parts, plan.blocks * (part + 1) / parts,
                        thread_scratch(scratch), shares + part * share,
                        &x_sums[part * 2 * s.channels]);
  });

  Tensor dweight = empty_like_weight(weight);
  switch (weight.scalar_type()) {
    case ScalarType::BFloat16:
      reduce_weight_gradient<c10::BFloat16>(plan, shares, parts, dweight);
      break;
    case ScalarType::Half:
      reduce_weight_gradient<c10::Half>(plan, shares, parts, dweight);
      break;
    default:
      reduce_weight_gradient<float>(plan, shares, parts, dweight);
  }
  Tensor dx_sums = empty_sums(x, prologue && wants_dx ? s.channels : 0);
  double* total = dx_sums.mutable_data_ptr<double>();
  std::fill(total, total + dx_sums.numel(), 0.0);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = 0; i < dx_sums.numel(); ++i) total[i] += x_sums[part * 2 * s.channels + i];
  return {dx, dweight, dbn_weight, dbn_bias, dx_sums};
}

}  // namespace
}  // namespace fastresnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fastresnet, CPU, m) {
  using namespace fastresnet::cpu;
  m.impl("conv_stats", TORCH_BOX(&conv_stats_cpu));
  m.impl("conv_bn_backward", TORCH_BOX(&conv_bn_backward_cpu));
}
