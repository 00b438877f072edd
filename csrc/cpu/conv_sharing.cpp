// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv_sharing.h"

#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>

#include "batch_norm.h"
#include "cpu/isa.h"
#include "cpu/result_memory.h"
#include "cpu/scratch.h"

namespace fastresnet::cpu {
namespace {

// What all threads stage together at a time: it is read once for every block of channels, and lies
// in a third-level cache at best.
constexpr int64_t kSharedBytes = 64 << 20;

int64_t threads() { return torch::stable::get_num_threads(); }

// body(part) for every part, which must not throw.
template <class Body>
void parallel(int64_t parts, Body body) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i);
  });
}

// body(panels) on every thread, for its share of the panels.
template <class Body>
void parallel_panels(int64_t panels, Body body) {
  torch::stable::parallel_for(0, panels, 1,
                              [&](int64_t first, int64_t last) { body(Range{first, last}); });
}

// Staged pixels of a block share the second-level cache with weights, results and their sources.
int64_t second_level_cache() {
  static const int64_t bytes = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 512 * 1024);
  return bytes;
}

// Bytes of what is staged for a pixel of so many channels, or for a tile of pixels.
int64_t staged_bytes(int64_t channels, int64_t tile, DType dtype) {
  const int64_t lines = padded(channels) / kernels().conv_line_channels(tile, dtype);
  return lines * kLineBytes * (tile > 1 ? (tile + 2) * (tile + 2) : 1);
}

// The same of the input, on a place of the grid: a pixel of each phase that is read.
int64_t input_bytes(const ConvShape& given, ConvMethod method, DType dtype) {
  const ConvShape s = ConvPlan::shape_of_products(given, method);
  const int64_t phases = std::min(s.stride * s.stride, s.kernel_height * s.kernel_width);
  return phases * staged_bytes(s.channels, method.tile, dtype);
}

// Without a halo, small blocks cost nothing and leave the cache to the weights, of which the
// gradients are read and written for each block: of less than `least_pixels` they are most of the
// work. Tiles are so large when staged that a block is best no larger than what is multiplied at a
// time.
ConvPlan plan_blocks(const ConvShape& s, ConvMethod method, int64_t place_bytes,
                     int64_t least_pixels) {
  if (method.tile > 1) return ConvPlan(s, method, 1, kBlockTiles, threads());
  const ConvShape computed = ConvPlan::shape_of_products(s, method);
  const bool pointwise =
      computed.kernel_height * computed.kernel_width == 1 && computed.stride == 1;
  const int64_t cache = second_level_cache();
  const int64_t bytes =
      std::clamp(least_pixels * place_bytes, cache / (pointwise ? 8 : 4), cache / 2);
  return ConvPlan(s, method, place_bytes, bytes, threads());
}

ConvPlan plan_shared(const ConvShape& s, ConvMethod method, int64_t place_bytes) {
  return ConvPlan(s, method, place_bytes, kSharedBytes, 1);
}

// All pixels in one block, or in one for each of some threads.
ConvPlan plan_whole(const ConvShape& s, ConvMethod method, int64_t place_bytes,
                    int64_t threads = 1) {
  return ConvPlan(s, method, place_bytes, std::numeric_limits<int64_t>::max() / 2, threads);
}

// Staged pixels of a block of a thread's own.
float* own_staged(int64_t floats) {
  static thread_local Scratch scratch;
  return scratch.floats(floats);
}
// Blocks of the weight, packed by the thread that multiplies with them.
float* own_weight(int64_t floats) {
  static thread_local Scratch scratch;
  return scratch.floats(floats);
}
// A thread's window on what it stages.
float* own_window(const ConvPlan& plan) {
  static thread_local Scratch scratch;
  if (plan.tile == 1) return nullptr;
  return scratch.floats(plan.window_rows(plan.rows) * plan.window_pitch() * kLineBytes /
                        int64_t{sizeof(float)});
}
// Gradients of a weight.
float* own_gradients(int64_t floats) {
  static thread_local Scratch scratch;
  return scratch.floats(floats);
}

// How many parts `count` things make of at most `most` each, as many for every thread.
int64_t parts_of(int64_t count, int64_t most) {
  const int64_t parts = ceil_div(count, most);
  return std::min(count, ceil_div(parts, threads()) * threads());
}

// The parts of a block that is shared out by channels: some blocks of channels, of some rows.
struct Share {
  int64_t groups;               // of rows
  int64_t blocks, block_parts;  // of channels
  int64_t whole_rows;

  // weight_bytes: of a block of channels. Pixels come from a cache that threads share, and are read
  // once for all channels of a part.
  Share(const ConvBlock& block, int64_t channels, int64_t weight_bytes)
      : blocks(channel_blocks(channels)),
        block_parts(parts_of(
            blocks, std::max<int64_t>(1, second_level_cache() / kWeightShare / weight_bytes))),
        whole_rows(block.images * block.rows) {
    groups = std::min(ceil_div(threads(), blocks), whole_rows);
  }
  int64_t parts() const { return groups * block_parts; }
  int64_t group(int64_t part) const { return part / block_parts; }
  Range rows(int64_t part) const { return rows_of_group(group(part)); }
  Range rows_of_group(int64_t group) const { return part_of(whole_rows, groups, group); }
  Range channel_blocks_of(int64_t part) const {
    return part_of(blocks, block_parts, part % block_parts);
  }

 private:
  static constexpr int64_t kWeightShare = 2;  // of the cache
};

// The parts of a weight's gradient: some blocks of output channels by some of the input channels
// that they meet, so that what is staged is read less often than once for each pair of them.
struct GradientParts {
  int64_t out_blocks, met, out_parts, met_parts;

  explicit GradientParts(const ConvPlan& plan)
      : out_blocks(channel_blocks(plan.shape.out_channels)),
        met(met_by_output(plan.shape, 0).count) {
    const int64_t spare = std::max<int64_t>(1, out_blocks * met / threads());
    int64_t outs = 1, mets = std::min<int64_t>(spare, 8);
    if (plan.tile == 1) {
      const int64_t pair_bytes = int64_t{sizeof(float)} * pair_size(plan) * plan.products();
      const int64_t pairs =
          std::clamp<int64_t>(second_level_cache() / kGradientShare / pair_bytes, 1, spare);
      mets = std::min(met, static_cast<int64_t>(std::sqrt(static_cast<double>(pairs))));
      outs = pairs / mets;
    }
    met_parts = ceil_div(met, mets);
    out_parts = parts_of(out_blocks, outs);
  }
  int64_t parts() const { return out_parts * met_parts; }
  // Of a part, at most.
  int64_t pairs() const { return ceil_div(out_blocks, out_parts) * ceil_div(met, met_parts); }
  Range outs(int64_t part) const { return part_of(out_blocks, out_parts, part / met_parts); }
  Range mets(int64_t part) const { return part_of(met, met_parts, part % met_parts); }

 private:
  static constexpr int64_t kGradientShare = 8;  // of the cache
};

// All of a weight, packed before or for the time of a call, or nothing.
class PackedWeight {
 public:
  PackedWeight(const WeightPacking& weight, bool wanted)
      : memory_(wanted && !weight.packed() ? weight.floats() : 0),
        floats_(weight.packed() ? weight.packed() : memory_.floats()) {
    if (memory_.floats()) weight.pack_all(memory_.floats());
  }
  const float* floats() const { return floats_; }

 private:
  Temporary memory_;
  const float* floats_;
};

// The weight as the parts of a convolution that is shared out by channels multiply with it: each
// part packs the blocks of its own, or, where that would be done for several blocks of pixels, all
// are packed before.
class PartWeight {
 public:
  PartWeight(const WeightPacking& weight, const ConvPlan& plan, bool wanted = true)
      : weight_(weight), packed_(weight, wanted && plan.blocks > 1) {}

  const float* blocks(Range channel_blocks) const {
    if (packed_.floats()) return packed_.floats() + channel_blocks.begin * weight_.block_floats();
    float* own = own_weight(channel_blocks.size() * weight_.block_floats());
    for (int64_t i = 0; i < channel_blocks.size(); ++i)
      weight_.pack(channel_blocks.begin + i, own + i * weight_.block_floats());
    return own;
  }
  int64_t block_bytes() const { return int64_t{sizeof(float)} * weight_.block_floats(); }

 private:
  const WeightPacking& weight_;
  PackedWeight packed_;
};

// Inference takes none.
int64_t moment_channels(const ConvForwardParams& p) {
  return p.inference ? 0 : p.plan->shape.out_channels;
}

OutputMoments forward_by_blocks(const ConvForwardParams& p, const WeightPacking& weight) {
  const ConvPlan& plan = *p.plan;
  const KernelTable& table = kernels();
  const int64_t parts = std::min(threads(), plan.blocks);
  const int64_t panels = padded(plan.shape.channels) / table.conv_line_channels(plan.tile, p.dtype);
  const int64_t out_blocks = channel_blocks(plan.shape.out_channels);
  const int64_t floats = table.conv_staged_floats(plan, p.dtype);
  OutputMoments moments(parts, moment_channels(p));
  const PackedWeight packed(weight, true);
  parallel(parts, [&](int64_t part) {
    float *staged = own_staged(floats), *window = own_window(plan);
    const Range blocks = part_of(plan.blocks, parts, part);
    for (int64_t i = blocks.begin; i < blocks.end; ++i) {
      const ConvBlock block = plan.block(i);
      const Range rows{0, block.images * block.rows};
      const int64_t outputs = plan.outputs(block, rows);
      if (outputs == 0) continue;
      if (!plan.in_place) table.conv_stage(p, block, {0, panels}, staged, window);
      table.conv_forward(p, block, staged, packed.floats(), rows, {0, out_blocks},
                         moments.of(part));
      moments.count(part, outputs);
    }
  });
  return moments;
}

OutputMoments forward_by_channels(const ConvForwardParams& p, const WeightPacking& weight) {
  const ConvPlan& plan = *p.plan;
  const KernelTable& table = kernels();
  const int64_t panels = padded(plan.shape.channels) / table.conv_line_channels(plan.tile, p.dtype);
  const int64_t out_channels = plan.shape.out_channels;
  const Temporary memory(table.conv_staged_floats(plan, p.dtype));
  float* staged = memory.floats();
  const PartWeight packed(weight, plan);
  const auto share_of = [&](const ConvBlock& block) {
    return Share(block, out_channels, packed.block_bytes());
  };
  OutputMoments moments(share_of(plan.block(0)).groups, moment_channels(p));
  for (int64_t i = 0; i < plan.blocks; ++i) {
    const ConvBlock block = plan.block(i);
    if (!plan.in_place)
      parallel_panels(panels, [&](Range range) {
        table.conv_stage(p, block, range, staged, own_window(plan));
      });
    const Share share = share_of(block);
    parallel(share.parts(), [&](int64_t part) {
      const Range channels = share.channel_blocks_of(part);
      table.conv_forward(p, block, staged, packed.blocks(channels), share.rows(part), channels,
                         moments.of(share.group(part)));
    });
    for (int64_t group = 0; group < share.groups; ++group)
      moments.count(group, plan.outputs(block, share.rows_of_group(group)));
  }
  return moments;
}

int64_t backward_panels(const ConvBackwardParams& p) {
  const ConvShape& s = p.plan->shape;
  return (padded(s.out_channels) + padded(s.channels)) /
         kernels().conv_line_channels(p.plan->tile, p.dtype);
}

std::vector<double> backward_by_blocks(const ConvBackwardParams& p, const WeightPacking& weight,
                                       WeightGradient& dweight) {
  const ConvPlan& plan = *p.plan;
  const ConvShape& s = plan.shape;
  const KernelTable& table = kernels();
  const int64_t parts = std::min(threads(), plan.blocks), panels = backward_panels(p);
  const int64_t out_blocks = channel_blocks(s.out_channels), in_blocks = channel_blocks(s.channels);
  const int64_t met = met_by_output(s, 0).count, pairs = out_blocks * met;
  const int64_t floats = table.conv_backward_staged_floats(plan, p.dtype);
  const int64_t share = padded_size(plan);
  const Temporary gradients(parts * share);
  float* shares = gradients.floats();
  std::vector<double> sums(parts * 2 * s.channels);
  const PackedWeight packed(weight, p.dx != nullptr);
  parallel(parts, [&](int64_t part) {
    float *staged = own_staged(floats), *window = own_window(plan);
    const Range blocks = part_of(plan.blocks, parts, part);
    for (int64_t i = blocks.begin; i < blocks.end; ++i) {
      const ConvBlock block = plan.block(i);
      table.conv_backward_stage(p, block, {0, panels}, staged, window);
      if (p.dx)
        table.conv_input_gradient(p, block, staged, packed.floats(), {0, block.images * block.rows},
                                  {0, in_blocks}, &sums[part * 2 * s.channels]);
      table.conv_weight_gradient(p, block, staged, {0, out_blocks}, {0, met}, i > blocks.begin,
                                 shares + part * share);
    }
  });
  parallel(pairs,
           [&](int64_t i) { dweight.store(i / met, i % met, shares, i, pairs, parts, share); });
  return sums;
}

std::vector<double> backward_by_channels(const ConvBackwardParams& p, const WeightPacking& weight,
                                         WeightGradient& dweight) {
  const ConvPlan& plan = *p.plan;
  const int64_t channels = plan.shape.channels;
  const KernelTable& table = kernels();
  const Temporary memory(table.conv_backward_staged_floats(plan, p.dtype));
  float* staged = memory.floats();
  const GradientParts gradient_parts(plan);
  const int64_t part_floats = gradient_parts.pairs() * pair_size(plan) * plan.products();
  // Added up over the blocks, if there are several.
  const Temporary totals(plan.blocks > 1 ? gradient_parts.parts() * part_floats : 0);
  float* total = totals.floats();
  const PartWeight packed(weight, plan, p.dx != nullptr);
  const auto share_of = [&](const ConvBlock& block) {
    return Share(block, channels, packed.block_bytes());
  };
  std::vector<double> sums(share_of(plan.block(0)).groups * 2 * channels);
  for (int64_t i = 0; i < plan.blocks; ++i) {
    const ConvBlock block = plan.block(i);
    parallel_panels(backward_panels(p), [&](Range range) {
      table.conv_backward_stage(p, block, range, staged, own_window(plan));
    });
    const Share share = share_of(block);
    if (p.dx)
      parallel(share.parts(), [&](int64_t part) {
        const Range blocks = share.channel_blocks_of(part);
        table.conv_input_gradient(p, block, staged, packed.blocks(blocks), share.rows(part), blocks,
                                  &sums[share.group(part) * 2 * channels]);
      });
    parallel(gradient_parts.parts(), [&](int64_t part) {
      const Range outs = gradient_parts.outs(part), mets = gradient_parts.mets(part);
      float* gradients = total ? total + part * part_floats : own_gradients(part_floats);
      table.conv_weight_gradient(p, block, staged, outs, mets, i > 0, gradients);
      if (i + 1 < plan.blocks) return;
      const int64_t pairs = outs.size() * mets.size();
      for (int64_t pair = 0; pair < pairs; ++pair)
        dweight.store(outs.begin + pair / mets.size(), mets.begin + pair % mets.size(), gradients,
                      pair, pairs, 1, 0);
    });
  }
  return sums;
}

// How a convolution may be computed. Patches are of the input as it is, and have no gradient.
std::vector<ConvMethod> methods(const ConvShape& s, DType dtype, bool may_be_patches) {
  const KernelTable& table = kernels();
  const bool narrow_groups =
      s.groups > 1 && s.group_width() < kChannelBlock && table.conv_multiplies_groups(dtype);
  std::vector<ConvMethod> found{{.narrow_groups = narrow_groups}};
  if (may_be_patches && s.groups == 1 && s.dilation == 1 &&
      s.kernel_height * s.kernel_width * s.channels <= kLargestPatch)
    found.push_back({.patches = true});
  if (s.kernel_height * s.kernel_width > 1)
    found.push_back({.image_step = table.conv_image_step(dtype), .narrow_groups = narrow_groups});
  if (s.kernel_height == 3 && s.kernel_width == 3 && s.stride == 1 && s.padding == 1 &&
      s.dilation == 1 && s.groups == 1)
    for (int64_t tile = 2; tile <= table.conv_largest_tile(dtype); tile *= 2)
      found.push_back({tile});
  return found;
}

// Whether products may read the convolution's input where it lies.
bool reads_in_place(const ConvShape& s, DType dtype) {
  // Rows of so many bytes fall on the same few lines of the first-level cache.
  constexpr int64_t kAliasedBytes = 4096;
  const int64_t row_bytes = s.channels * (dtype == DType::float32 ? 4 : 2);
  return s.kernel_height == 1 && s.kernel_width == 1 && s.stride == 1 && s.padding == 0 &&
         s.groups == 1 && s.channels % kChannelBlock == 0 && row_bytes % kAliasedBytes != 0 &&
         kernels().conv_reads_memory(dtype);
}

// What the products cost: the lines of their rows. A product's weights cost what so many rows of it
// would: to be packed, or, packed before, to be read from memory.
constexpr int64_t kPackingRows = 40, kReadingRows = 20;
double cost(const ConvPlan& plan, DType dtype, bool packed) {
  const int64_t rows_of_weight = packed ? kReadingRows : kPackingRows;
  return static_cast<double>(plan.rows_multiplied() + rows_of_weight * plan.products()) *
         static_cast<double>(padded(plan.shape.channels)) /
         static_cast<double>(kernels().conv_line_channels(plan.tile, dtype));
}

// The cheapest of what share(method) makes of the methods.
template <class Share>
Sharing cheapest(const ConvShape& s, DType dtype, bool may_be_patches, bool packed, Share share) {
  // With fewer rows a product is not worth its begin and end.
  constexpr int64_t kLeastImages = 8;
  const std::vector<ConvMethod> all = methods(s, dtype, may_be_patches);
  Sharing best = share(all[0]);
  for (size_t i = 1; i < all.size(); ++i) {
    Sharing other = share(all[i]);
    if (other.plan.by_places && other.plan.images < kLeastImages) continue;
    if (cost(other.plan, dtype, packed) < cost(best.plan, dtype, packed)) best = std::move(other);
  }
  return best;
}

// How much rather a convolution is shared out by channels: planes of places hold whole images, of
// which a cache of a thread's own has room for few.
int64_t preference(ConvMethod method) { return method.image_step > 0 ? 4 : 1; }

Sharing find_forward(const ConvShape& s, DType dtype, bool normalised, bool packed) {
  const KernelTable& table = kernels();
  return cheapest(s, dtype, !normalised, packed, [&](ConvMethod method) -> Sharing {
    const int64_t place_bytes = input_bytes(s, method, dtype);
    const ConvPlan whole = plan_whole(s, method, place_bytes);
    const int64_t weight_bytes =
        padded_size(whole) / table.conv_line_channels(method.tile, dtype) * kLineBytes;
    const int64_t whole_bytes = int64_t{sizeof(float)} * table.conv_staged_floats(whole, dtype);
    const bool by_channels = preference(method) * threads() * weight_bytes > 2 * whole_bytes;
    // Nothing is staged then that would have to find room in a cache.
    if (!normalised && !method.patches && reads_in_place(s, dtype))
      return {by_channels,
              plan_whole(s, {.in_place = true}, place_bytes, by_channels ? 1 : threads())};
    if (by_channels) return {true, plan_shared(s, method, place_bytes)};
    return {false, plan_blocks(s, method, place_bytes, 1)};
  });
}

Sharing find_backward(const ConvShape& s, DType dtype, bool normalised, bool wants_dx) {
  constexpr int64_t kLeastPixels = 256;
  return cheapest(s, dtype, !normalised && !wants_dx, false, [&](ConvMethod method) -> Sharing {
    const int64_t place_bytes =
        input_bytes(s, method, dtype) +
        (method.tile > 1 ? 2 : 1) * staged_bytes(s.out_channels, method.tile, dtype);
    const ConvPlan whole = plan_whole(s, method, place_bytes);
    const int64_t staged_floats = kernels().conv_backward_staged_floats(whole, dtype);
    if (preference(method) * threads() * padded_size(whole) > staged_floats)
      return {true, plan_shared(s, method, place_bytes)};
    return {false, plan_blocks(s, method, place_bytes, kLeastPixels)};
  });
}

// All that the choice depends on; the level stays as it is.
struct Problem {
  ConvShape shape;
  DType dtype;
  bool normalised, packed, backward, wants_dx;
  int64_t threads;

  auto operator<=>(const Problem&) const = default;
};

Sharing find(const Problem& p) {
  return p.backward ? find_backward(p.shape, p.dtype, p.normalised, p.wants_dx)
                    : find_forward(p.shape, p.dtype, p.normalised, p.packed);
}

std::shared_ptr<const Sharing> remembered(const Problem& problem) {
  constexpr size_t kMost = 4096;  // inputs of ever new sizes would fill the memory
  static std::mutex mutex;
  static std::map<Problem, std::shared_ptr<const Sharing>> known;
  const std::lock_guard lock(mutex);
  if (const auto it = known.find(problem); it != known.end()) return it->second;
  if (known.size() == kMost) known.clear();
  return known.emplace(problem, std::make_shared<const Sharing>(find(problem))).first->second;
}

}  // namespace

std::shared_ptr<const Sharing> share_forward(const ConvShape& s, DType dtype, bool normalised,
                                             bool packed) {
  return remembered({s, dtype, normalised, packed, false, false, threads()});
}

std::shared_ptr<const Sharing> share_backward(const ConvShape& s, DType dtype, bool normalised,
                                              bool wants_dx) {
  return remembered({s, dtype, normalised, false, true, wants_dx, threads()});
}

OutputMoments::OutputMoments(int64_t groups, int64_t channels)
    : channels_(channels),
      shift_(groups * channels),
      sums_(groups * 2 * channels),
      counts_(groups) {}

ConvMoments OutputMoments::of(int64_t group) {
  double* sums = sums_.data() + group * 2 * channels_;
  return {counts_[group] == 0, shift_.data() + group * channels_, sums, sums + channels_};
}

void OutputMoments::merge(float* mean, float* var) const {
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

OutputMoments forward(const ConvForwardParams& p, const Sharing& sharing,
                      const WeightPacking& weight) {
  return sharing.by_channels ? forward_by_channels(p, weight) : forward_by_blocks(p, weight);
}

std::vector<double> backward(const ConvBackwardParams& p, const Sharing& sharing,
                             const WeightPacking& weight, WeightGradient& dweight) {
  return sharing.by_channels ? backward_by_channels(p, weight, dweight)
                             : backward_by_blocks(p, weight, dweight);
}

}  // namespace fastresnet::cpu
