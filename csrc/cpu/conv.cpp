// SPDX-License-Identifier: Apache-2.0
// The CPU entries of the convolutions: tensors in, checks, a plan, packed weights, the kernels of
// the ISA level in use over the threads' blocks. The loops are in kernels/conv-inl.h.
#include <torch/csrc/stable/library.h>
#include <unistd.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "batch_norm.h"
#include "check.h"
#include "cpu/bn_vectors.h"
#include "cpu/conv_params.h"
#include "cpu/conv_weight.h"
#include "cpu/isa.h"
#include "cpu/result_memory.h"
#include "cpu/scratch.h"

namespace fastresnet::cpu {
namespace {

constexpr int64_t kLineBytes = 64;

int64_t threads() { return torch::stable::get_num_threads(); }

// body(part) for every part, which must not throw.
template <class Body>
void parallel(int64_t parts, Body body) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i);
  });
}

// Whether a result is too large to be found in a cache by whoever reads it next, and may be written
// by whole lines.
bool past_caches(const Tensor& result, int64_t channels) {
  constexpr int64_t kLeast = 8 << 20;
  const int64_t pixel_bytes = channels * static_cast<int64_t>(result.element_size());
  const int64_t bytes = result.numel() * static_cast<int64_t>(result.element_size());
  return bytes >= kLeast && pixel_bytes % kLineBytes == 0 &&
         reinterpret_cast<intptr_t>(result.const_data_ptr()) % kLineBytes == 0;
}

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                    int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

ConvShape check_conv(const char* op, const Tensor& x, const Tensor& weight, int64_t stride,
                     int64_t padding, int64_t dilation, int64_t groups) {
  check_input(op, x);
  check(groups >= 1 && x.size(1) % groups == 0, op, ": expected groups that divide the ", x.size(1),
        " channels, got ", groups);
  const int64_t width = x.size(1) / groups;
  check(weight.defined() && weight.dim() == 4 && weight.size(1) == width && weight.numel() > 0, op,
        ": expected weight of shape [out_channels, ", width, ", height, width], got ",
        weight.defined() ? shape(weight) : "None");
  check(groups == 1 || (weight.size(0) == x.size(1) &&
                        (width % kChannelBlock == 0 || kChannelBlock % width == 0)),
        op, ": expected groups with as many output as input channels, a number that divides ",
        kChannelBlock, " or is divided by it, got ", shape(weight), " in ", groups, " groups");
  dtype_of(op, weight);
  check(weight.device() == x.device(), op, ": expected weight and x on one device");
  check(stride >= 1 && stride <= kMaxStride, op, ": expected a stride of 1 to ", kMaxStride,
        ", got ", stride);
  check(padding >= 0 && dilation >= 1, op, ": expected padding >= 0 and dilation >= 1, got ",
        padding, " and ", dilation);
  ConvShape s{x.size(0),      x.size(2),      x.size(3), x.size(1), 0,        0,     weight.size(0),
              weight.size(2), weight.size(3), stride,    padding,   dilation, groups};
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

// How many outputs a side to compute together, by what the products cost: (tile + 2)^2 of them for
// the tiles, of single floats, against 9 for the pixels and the padding between rows, of as many
// values as a line holds. Packing a product's weights costs what so many rows of it would.
int64_t choose_tile(const ConvShape& s, DType dtype) {
  constexpr int64_t kPacking = 40;
  const bool possible = s.kernel_height == 3 && s.kernel_width == 3 && s.stride == 1 &&
                        s.padding == 1 && s.dilation == 1 && s.groups == 1;
  if (!possible) return 1;
  const KernelTable& table = kernels();
  const auto cost = [&](int64_t tile) {
    const int64_t height = (s.height + tile - 1) / tile, width = (s.width + tile - 1) / tile;
    const int64_t products = tile > 1 ? (tile + 2) * (tile + 2) : 9;
    const int64_t rows = s.batch * height * (tile > 1 ? width : width + 1);
    return products * (rows + kPacking) * table.conv_line_channels(1, DType::float32) /
           static_cast<double>(table.conv_line_channels(tile, dtype));
  };
  int64_t best = 1;
  for (int64_t tile = 2; tile <= table.conv_largest_tile(dtype); tile *= 2)
    if (cost(tile) < cost(best)) best = tile;
  return best;
}

// Bytes of one staged pixel of so many channels.
int64_t staged_bytes(int64_t channels, DType dtype) {
  return padded(channels) / kernels().conv_line_channels(1, dtype) * kLineBytes;
}

// Bytes of a staged pixel of the grid, of all phases that are read.
int64_t input_bytes(const ConvShape& s, DType dtype) {
  const int64_t phases = std::min(s.stride * s.stride, s.kernel_height * s.kernel_width);
  return phases * staged_bytes(s.channels, dtype);
}

// Without a halo, small blocks cost nothing and leave the cache to the weights. Tiles are so large
// when staged that a block is best no larger than what is multiplied at a time.
ConvPlan plan_blocks(const ConvShape& s, int64_t tile, int64_t pixel_bytes) {
  if (tile > 1) return ConvPlan(s, tile, 1, kBlockTiles, threads());
  const bool pointwise = s.kernel_height * s.kernel_width == 1 && s.stride == 1;
  return ConvPlan(s, 1, pixel_bytes, second_level_cache() / (pointwise ? 16 : 4), threads());
}

ConvPlan plan_whole(const ConvShape& s, int64_t tile, int64_t pixel_bytes) {
  return ConvPlan(s, tile, pixel_bytes, std::numeric_limits<int64_t>::max() / 2, 1);
}

// Staged pixels of a block of a thread's own, and of those that all threads work on.
float* own_staged(int64_t floats) {
  static thread_local Scratch scratch;
  return scratch.floats(floats);
}
float* shared_staged(int64_t floats) {
  static thread_local Scratch scratch;
  return scratch.floats(floats);
}
// A block of the weight, packed by the thread that multiplies with it.
float* own_weight(const WeightPacking& weight) {
  static thread_local Scratch scratch;
  return scratch.floats(weight.block_floats());
}
// A thread's window on what it stages.
float* own_window(const ConvPlan& plan) {
  static thread_local Scratch scratch;
  if (plan.tile == 1) return nullptr;
  return scratch.floats(plan.window_rows(plan.rows) * plan.window_pitch() * kLineBytes /
                        int64_t{sizeof(float)});
}

// A convolution is shared out between threads in one of two ways. By blocks: each thread stages
// blocks of pixels of its own in its second-level cache, and reads the whole weight for each.
// By channels: all threads stage all pixels, then each takes some channels of the result, so that
// every weight is read, and every gradient of a weight written, once. That is the better way where
// there are more weights than pixels. Where there are fewer blocks of channels than threads, they
// share out the pixels too.
struct Share {
  int64_t groups;  // of rows
  int64_t blocks;  // of channels
  Range whole_rows;

  Share(const ConvBlock& block, int64_t channels)
      : groups(1), blocks(channel_blocks(channels)), whole_rows{0, block.images * block.rows} {
    groups = std::min((threads() + blocks - 1) / blocks, whole_rows.end);
  }
  int64_t parts() const { return groups * blocks; }
  int64_t group(int64_t part) const { return part / blocks; }
  Range rows(int64_t part) const {
    return {whole_rows.end * group(part) / groups, whole_rows.end * (group(part) + 1) / groups};
  }
  Range channel_block(int64_t part) const { return {part % blocks, part % blocks + 1}; }
};

// body(panels) on every thread, for its share of the panels.
template <class Body>
void parallel_panels(int64_t panels, Body body) {
  torch::stable::parallel_for(0, panels, 1,
                              [&](int64_t first, int64_t last) { body(Range{first, last}); });
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

// Moments of y, group by group of its rows.
class OutputMoments {
 public:
  OutputMoments(int64_t groups, int64_t channels)
      : channels_(channels),
        shift_(groups * channels),
        sums_(groups * 2 * channels),
        counts_(groups) {}

  ConvMoments of(int64_t group, bool first) {
    double* sums = &sums_[group * 2 * channels_];
    return {first, &shift_[group * channels_], sums, sums + channels_};
  }
  void count(int64_t group, int64_t outputs) { counts_[group] += static_cast<double>(outputs); }
  double count(int64_t group) const { return counts_[group]; }

  // Mean and biased variance of each channel.
  void merge(float* mean, float* var) const {
    for (int64_t c = 0; c < channels_; ++c) {
      Moments<double> total{0, 0, 0};
      for (size_t group = 0; group < counts_.size(); ++group) {
        if (counts_[group] == 0) continue;
        const double* sums = &sums_[group * 2 * channels_];
        const double offset = sums[c] / counts_[group];
        const double m2 = std::max(0.0, sums[channels_ + c] - offset * sums[c]);
        const double of_group = shift_[group * channels_ + c] + offset;
        total = fastresnet::merge(total, {counts_[group], of_group, m2});
      }
      mean[c] = static_cast<float>(total.mean);
      var[c] = static_cast<float>(total.biased_variance());
    }
  }

 private:
  int64_t channels_;
  std::vector<float> shift_;
  std::vector<double> sums_, counts_;
};

OutputMoments forward_by_blocks(const ConvForwardParams& p, const WeightPacking& weight) {
  const ConvPlan& plan = *p.plan;
  const KernelTable& table = kernels();
  const int64_t parts = std::min(threads(), plan.blocks);
  const int64_t panels = padded(plan.shape.channels) / table.conv_line_channels(plan.tile, p.dtype);
  const int64_t out_blocks = channel_blocks(plan.shape.out_channels);
  const int64_t floats = table.conv_staged_floats(plan, p.dtype);
  OutputMoments moments(parts, plan.shape.out_channels);
  const float* packed = weight.pack_all();
  parallel(parts, [&](int64_t part) {
    float *staged = own_staged(floats), *window = own_window(plan);
    for (int64_t i = plan.blocks * part / parts; i < plan.blocks * (part + 1) / parts; ++i) {
      const ConvBlock block = plan.block(i);
      const Range rows{0, block.images * block.rows};
      const int64_t outputs = plan.outputs(block, rows);
      if (outputs == 0) continue;
      table.conv_stage(p, block, {0, panels}, staged, window);
      table.conv_forward(p, block, staged, packed, rows, {0, out_blocks},
                         moments.of(part, moments.count(part) == 0));
      moments.count(part, outputs);
    }
  });
  return moments;
}

OutputMoments forward_by_channels(const ConvForwardParams& p, const WeightPacking& weight) {
  const ConvPlan& plan = *p.plan;
  const KernelTable& table = kernels();
  const ConvBlock block = plan.block(0);
  const int64_t panels = padded(plan.shape.channels) / table.conv_line_channels(plan.tile, p.dtype);
  float* staged = shared_staged(table.conv_staged_floats(plan, p.dtype));
  parallel_panels(
      panels, [&](Range range) { table.conv_stage(p, block, range, staged, own_window(plan)); });
  const Share share(block, plan.shape.out_channels);
  OutputMoments moments(share.groups, plan.shape.out_channels);
  parallel(share.parts(), [&](int64_t part) {
    float* packed = own_weight(weight);
    weight.pack(share.channel_block(part).begin, packed);
    table.conv_forward(p, block, staged, packed, share.rows(part), share.channel_block(part),
                       moments.of(share.group(part), true));
  });
  for (int64_t group = 0; group < share.groups; ++group)
    moments.count(group, plan.outputs(block, share.rows(group * share.blocks)));
  return moments;
}

int64_t conv_tile_cpu(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding,
                      int64_t dilation, int64_t groups) {
  const ConvShape s = check_conv("conv_tile", x, weight, stride, padding, dilation, groups);
  return choose_tile(s, dtype_of("conv_tile", x));
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
  const KernelTable& table = kernels();

  Tensor y = new_result({s.batch, s.out_channels, s.out_height, s.out_width}, x.scalar_type(),
                        MemoryFormat::ChannelsLast);
  ConvForwardParams p{};
  p.dtype = dtype;
  p.x = x.const_data_ptr();
  if (prologue) {
    p.scale = prologue->scale.data();
    p.shift = prologue->shift.data();
  }
  p.y = y.mutable_data_ptr();
  p.past_caches = past_caches(y, s.out_channels);

  const int64_t tile = choose_tile(s, dtype), pixel_bytes = input_bytes(s, dtype);
  const ConvPlan blocks = plan_blocks(s, tile, pixel_bytes);
  const ConvPlan whole = plan_whole(s, tile, pixel_bytes);
  const int64_t line_channels = table.conv_line_channels(tile, dtype);
  const int64_t weight_bytes = padded_size(whole) / line_channels * kLineBytes;
  const bool by_channels = threads() * weight_bytes >
                           2 * int64_t{sizeof(float)} * table.conv_staged_floats(whole, dtype);
  const ConvPlan& plan = by_channels ? whole : blocks;
  p.plan = &plan;
  const WeightPacking packing(weight, plan, dtype, false);
  const OutputMoments moments =
      by_channels ? forward_by_channels(p, packing) : forward_by_blocks(p, packing);

  Tensor mean = empty_vector(x, s.out_channels), var = empty_vector(x, s.out_channels);
  moments.merge(mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>());
  return {y, mean, var};
}

int64_t backward_panels(const ConvBackwardParams& p) {
  const ConvShape& s = p.plan->shape;
  return (padded(s.out_channels) + padded(s.channels)) /
         kernels().conv_line_channels(p.plan->tile, p.dtype);
}

// Both return the sums of dx and dx * (x - x_mean), [groups, 2, channels], still to be added up.
std::vector<double> backward_by_blocks(const ConvBackwardParams& p, const WeightPacking& weight,
                                       WeightGradient& dweight) {
  static thread_local Scratch shares_scratch;
  const ConvPlan& plan = *p.plan;
  const ConvShape& s = plan.shape;
  const KernelTable& table = kernels();
  const int64_t parts = std::min(threads(), plan.blocks), panels = backward_panels(p);
  const int64_t out_blocks = channel_blocks(s.out_channels), in_blocks = channel_blocks(s.channels);
  const int64_t met = met_by_output(s, 0).count;
  const int64_t floats = table.conv_backward_staged_floats(plan, p.dtype);
  const int64_t share = padded_size(plan);
  float* shares = shares_scratch.floats(parts * share);
  std::vector<double> sums(parts * 2 * s.channels);
  const float* packed = p.dx ? weight.pack_all() : nullptr;
  parallel(parts, [&](int64_t part) {
    float *staged = own_staged(floats), *window = own_window(plan);
    const int64_t first = plan.blocks * part / parts;
    for (int64_t i = first; i < plan.blocks * (part + 1) / parts; ++i) {
      const ConvBlock block = plan.block(i);
      table.conv_backward_stage(p, block, {0, panels}, staged, window);
      if (p.dx)
        table.conv_input_gradient(p, block, staged, packed, {0, block.images * block.rows},
                                  {0, in_blocks}, &sums[part * 2 * s.channels]);
      table.conv_weight_gradient(p, block, staged, {0, out_blocks}, {0, met}, i > first,
                                 shares + part * share);
    }
  });
  const int64_t pairs = out_blocks * met;
  parallel(pairs,
           [&](int64_t i) { dweight.store(i / met, i % met, shares, i, pairs, parts, share); });
  return sums;
}

std::vector<double> backward_by_channels(const ConvBackwardParams& p, const WeightPacking& weight,
                                         WeightGradient& dweight) {
  const ConvPlan& plan = *p.plan;
  const ConvShape& s = plan.shape;
  const KernelTable& table = kernels();
  const ConvBlock block = plan.block(0);
  const int64_t out_blocks = channel_blocks(s.out_channels), met = met_by_output(s, 0).count;
  float* staged = shared_staged(table.conv_backward_staged_floats(plan, p.dtype));
  parallel_panels(backward_panels(p), [&](Range range) {
    table.conv_backward_stage(p, block, range, staged, own_window(plan));
  });
  const Share share(block, s.channels);
  std::vector<double> sums(share.groups * 2 * s.channels);
  if (p.dx)
    parallel(share.parts(), [&](int64_t part) {
      float* packed = own_weight(weight);
      weight.pack(share.channel_block(part).begin, packed);
      table.conv_input_gradient(p, block, staged, packed, share.rows(part),
                                share.channel_block(part),
                                &sums[share.group(part) * 2 * s.channels]);
    });
  // With tiles, some blocks at a time, for which what is staged is read once.
  const int64_t together = plan.tile > 1 ? 8 : 1;
  const int64_t tiles = padded_size(plan) / (out_blocks * met);
  const int64_t met_parts = (met + together - 1) / together;
  parallel(out_blocks * met_parts, [&](int64_t i) {
    static thread_local Scratch scratch;
    float* own = scratch.floats(tiles * together);
    const int64_t n = i / met_parts, first = i % met_parts * together;
    const Range range{first, std::min(met, first + together)};
    table.conv_weight_gradient(p, block, staged, {n, n + 1}, range, false, own);
    for (int64_t c = range.begin; c < range.end; ++c)
      dweight.store(n, c, own, c - first, range.end - first, 1, 0);
  });
  return sums;
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
  const KernelTable& table = kernels();
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

  const int64_t tile = choose_tile(s, dtype);
  const int64_t pixel_bytes = input_bytes(s, dtype) + staged_bytes(s.out_channels, dtype);
  const ConvPlan blocks = plan_blocks(s, tile, pixel_bytes);
  const ConvPlan whole = plan_whole(s, tile, pixel_bytes);
  const bool by_channels =
      threads() * padded_size(whole) > table.conv_backward_staged_floats(whole, dtype);
  const ConvPlan& plan = by_channels ? whole : blocks;
  p.plan = &plan;
  if (wants_dx) {
    p.dx = dx.mutable_data_ptr();
    p.past_caches = past_caches(dx, s.channels);
  }
  const WeightPacking packing(weight, plan, dtype, true);
  WeightGradient dweight(weight, plan);
  const std::vector<double> x_sums = by_channels ? backward_by_channels(p, packing, dweight)
                                                 : backward_by_blocks(p, packing, dweight);

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
  m.impl("conv_tile", TORCH_BOX(&conv_tile_cpu));
  m.impl("conv_stats", TORCH_BOX(&conv_stats_cpu));
  m.impl("conv_bn_backward", TORCH_BOX(&conv_bn_backward_cpu));
}
