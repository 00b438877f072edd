// SPDX-License-Identifier: Apache-2.0
// The CPU entry of warp: tensors in, checks, each image's geometry in whole numbers, the kernel of
// the ISA level in use over the threads' images. The loops are in kernels/warp-inl.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/partition.h"
#include "cpu/range.h"
#include "cpu/scratch.h"
#include "cpu/warp_params.h"

namespace fastresnet::cpu {
namespace {

constexpr const char* op = "warp";
// Positions, also those of black pixels, stay far from the end of 64 bits.
constexpr int64_t kMaxSide = 32767;
constexpr double kMaxPosition = 1 << 24;

struct Box {
  double left, top, right, bottom;
};

// What a call says of one image.
struct Request {
  const uint8_t* image;
  Box box;
  int64_t rows, columns;  // of the resized crop
  const double* turn;     // [2, 3]
};

// What the images of a call have in common.
struct Source {
  int64_t rows, columns, row_stride, image_stride;  // strides in bytes
  int32_t channels;
};

int64_t fixed(double position) { return std::llround(std::ldexp(position, kPositionBits)); }

Walk walk(const double* turn) {
  return {fixed(0.5 * (turn[0] + turn[1]) + turn[2] - 0.5), fixed(turn[0]), fixed(turn[1])};
}

bool moves_by_whole_pixels(const Walk& w) {
  constexpr int64_t one = int64_t{1} << kPositionBits;
  const auto whole = [](int64_t step) { return step == 0 || step == one || step == -one; };
  return whole(w.across) && whole(w.down) && w.origin % one == 0;
}

// The pixels of `side` that a walk over the output meets, the neighbours that it blends included.
Range met(const Walk& w, int64_t out_rows, int64_t out_columns, int64_t side) {
  const int64_t across = w.across * (out_columns - 1), down = w.down * (out_rows - 1);
  const int64_t first = w.origin + std::min<int64_t>(0, across) + std::min<int64_t>(0, down);
  const int64_t last = w.origin + std::max<int64_t>(0, across) + std::max<int64_t>(0, down);
  const int64_t begin = std::clamp<int64_t>(first >> kPositionBits, 0, side);
  return {begin, std::clamp<int64_t>((last >> kPositionBits) + 2, begin, side)};
}

// Lines `wanted` of a crop from `begin` to `end` that is resized to `count`, as sums over those of
// an image of `side`. Antialiased as in PIL and torch: the weights of a line fall off linearly from
// its centre and reach zero one resized line away, or one of the source's where that is more.
void add_lines(double begin, double end, int64_t count, Range wanted, int64_t side,
               std::vector<ResizedLine>& lines, std::vector<float>& weights) {
  const double step = (end - begin) / static_cast<double>(count), reach = std::max(step, 1.0);
  for (int64_t i = wanted.begin; i < wanted.end; ++i) {
    const double centre = begin + step * (static_cast<double>(i) + 0.5);
    const auto first =
        static_cast<int64_t>(std::max(std::floor(begin), std::floor(centre - reach + 0.5)));
    const auto last =
        static_cast<int64_t>(std::min(std::ceil(end), std::floor(centre + reach + 0.5)));
    const auto weight = [&](int64_t line) {
      return 1 - std::abs(static_cast<double>(line) + 0.5 - centre) / reach;
    };
    double total = 0;
    for (int64_t line = first; line < last; ++line) total += weight(line);
    // What lies outside the image is black, and has weights of its own all the same. The sum is
    // what is rounded, not each weight, so that all of them add up to one.
    const int64_t inside = std::clamp<int64_t>(first, 0, side);
    const int64_t behind = std::clamp<int64_t>(last, inside, side);
    lines.push_back({inside, behind - inside, static_cast<int64_t>(weights.size())});
    double sum = 0;
    int64_t rounded = 0;
    for (int64_t line = first; line < last; ++line) {
      sum += weight(line) / total;
      const int64_t next = std::llround(std::ldexp(sum, kResizeBits));
      if (line >= inside && line < behind) weights.push_back(static_cast<float>(next - rounded));
      rounded = next;
    }
  }
}

// The source's lines that any of `lines` is a sum of; those then count from the first of them.
Range rebase(std::vector<ResizedLine>& lines) {
  Range used{0, 0};
  for (const ResizedLine& line : lines) {
    if (line.count == 0) continue;
    if (used.end == 0) used.begin = line.first;
    used.begin = std::min(used.begin, line.first);
    used.end = std::max(used.end, line.first + line.count);
  }
  for (ResizedLine& line : lines) line.first = line.count ? line.first - used.begin : 0;
  return used;
}

int64_t whole_squares(int64_t pixels) { return (pixels + kSquare - 1) / kSquare * kSquare; }

// An odd number of lines of cache, so that those of a column fall into different sets.
int64_t padded_stride(int64_t pixels) { return whole_squares(pixels) / 32 * 32 + kSquare; }

// The geometry of one image, and memory for its stages; one a thread.
class Planner {
 public:
  void plan(const Source& source, const Request& request, WarpParams& p) {
    const Box& box = request.box;
    p.u = walk(request.turn);
    p.v = walk(request.turn + 3);
    p.whole_pixels = moves_by_whole_pixels(p.u) && moves_by_whole_pixels(p.v);
    Range columns = met(p.u, p.out_rows, p.out_columns, request.columns);
    Range rows = met(p.v, p.out_rows, p.out_columns, request.rows);
    p.channels = source.channels;
    p.source_stride = source.row_stride;
    p.resized_rows = p.resized_columns = nullptr;
    p.upright = p.sideways = nullptr;

    Range source_rows, source_columns;
    const bool resized = box.left != std::floor(box.left) || box.top != std::floor(box.top) ||
                         box.right - box.left != static_cast<double>(request.columns) ||
                         box.bottom - box.top != static_cast<double>(request.rows);
    if (resized) {
      rows_.clear();
      columns_.clear();
      weights_.clear();
      add_lines(box.left, box.right, request.columns, columns, source.columns, columns_, weights_);
      add_lines(box.top, box.bottom, request.rows, rows, source.rows, rows_, weights_);
      source_columns = rebase(columns_);
      source_rows = rebase(rows_);
      p.resized_rows = rows_.data();
      p.resized_columns = columns_.data();
      p.weights = weights_.data();
    } else {
      const auto left = static_cast<int64_t>(box.left), top = static_cast<int64_t>(box.top);
      const auto cut = [](Range wanted, int64_t corner, int64_t side) {
        const int64_t begin = std::clamp<int64_t>(wanted.begin + corner, 0, side);
        return Range{begin, std::clamp<int64_t>(wanted.end + corner, begin, side)};
      };
      source_columns = cut(columns, left, source.columns);
      source_rows = cut(rows, top, source.rows);
      columns = {source_columns.begin - left, source_columns.end - left};
      rows = {source_rows.begin - top, source_rows.end - top};
    }
    p.source = request.image + source_rows.begin * source.row_stride +
               source_columns.begin * source.channels;
    p.source_rows = source_rows.end - source_rows.begin;
    p.source_columns = source_columns.end - source_columns.begin;
    p.rows = rows.end - rows.begin;
    p.columns = columns.end - columns.begin;
    p.u.origin -= columns.begin * (int64_t{1} << kPositionBits);
    p.v.origin -= rows.begin * (int64_t{1} << kPositionBits);
    p.stride = padded_stride(p.columns);
    if (resized) p.sideways = pixels(sideways_, whole_squares(p.source_columns) * kSquare);
    if (resized || !has_wide_pixels(source))
      p.upright = pixels(upright_, whole_squares(p.rows) * p.stride);
  }

 private:
  // Whether the source can be turned as it lies.
  static bool has_wide_pixels(const Source& source) {
    return source.channels == 4 && source.row_stride % 4 == 0 && source.row_stride <= 4 * kMaxSide;
  }

  static uint32_t* pixels(Scratch& scratch, int64_t count) {
    return reinterpret_cast<uint32_t*>(scratch.floats(count));
  }

  std::vector<ResizedLine> rows_, columns_;
  std::vector<float> weights_;
  Scratch sideways_, upright_;
};

void check_table(const char* name, const Tensor& t, ScalarType dtype,
                 std::initializer_list<int64_t> sizes) {
  bool ok = t.defined() && t.scalar_type() == dtype && t.is_contiguous() &&
            t.dim() == static_cast<int64_t>(sizes.size());
  std::string expected;
  for (int64_t size : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  for (int64_t d = 0; ok && d < t.dim(); ++d) ok = t.size(d) == sizes.begin()[d];
  check(ok, op, ": expected ", name, " of ", torch::headeronly::toString(dtype), " [", expected,
        "], contiguous, got ", t.defined() ? torch::headeronly::toString(t.scalar_type()) : "None",
        " ", t.defined() ? shape(t) : "");
}

Source check_images(const Tensor& images) {
  check(images.scalar_type() == ScalarType::Byte, op, ": expected images of uint8, got ",
        torch::headeronly::toString(images.scalar_type()));
  check(images.dim() == 4, op, ": expected images of 4 dimensions (N, H, W, C), got shape ",
        shape(images));
  const int64_t channels = images.size(3);
  check(channels == 1 || channels == 3 || channels == 4, op,
        ": expected images of 1, 3 or 4 channels [N, H, W, C], got shape ", shape(images));
  check(images.size(1) >= 1 && images.size(1) <= kMaxSide && images.size(2) >= 1 &&
            images.size(2) <= kMaxSide,
        op, ": expected images of 1 to ", kMaxSide, " pixels a side, got shape ", shape(images));
  check((images.size(3) == 1 || images.stride(3) == 1) &&
            (images.size(2) == 1 || images.stride(2) == channels) &&
            (images.size(1) == 1 || images.stride(1) >= images.size(2) * channels),
        op, ": expected images whose rows are dense, got shape ", shape(images),
        " with other strides");
  return {images.size(1), images.size(2),
          images.size(1) == 1 ? images.size(2) * channels : images.stride(1), images.stride(0),
          static_cast<int32_t>(channels)};
}

void check_request(const Request& r, int64_t i, const WarpParams& p) {
  const Box& b = r.box;
  const auto reachable = [](double position) { return std::abs(position) <= 2 * kMaxSide; };
  check(reachable(b.left) && reachable(b.top) && reachable(b.right) && reachable(b.bottom) &&
            b.left < b.right && b.top < b.bottom,
        op,
        ": expected boxes (left, top, right, bottom) with left < right and top < bottom, within ",
        2 * kMaxSide, " pixels, got (", b.left, ", ", b.top, ", ", b.right, ", ", b.bottom,
        ") for image ", i);
  check(r.rows >= 1 && r.rows <= kMaxSide && r.columns >= 1 && r.columns <= kMaxSide, op,
        ": expected resized sizes of 1 to ", kMaxSide, ", got (", r.rows, ", ", r.columns,
        ") for image ", i);
  for (int axis = 0; axis < 2; ++axis) {
    const double* m = r.turn + 3 * axis;
    const double furthest = std::abs(m[0]) * static_cast<double>(p.out_columns) +
                            std::abs(m[1]) * static_cast<double>(p.out_rows) + std::abs(m[2]);
    check(furthest <= kMaxPosition, op, ": expected turns that lead no further than ",
          static_cast<int64_t>(kMaxPosition), " pixels away, got row (", m[0], ", ", m[1], ", ",
          m[2], ") for image ", i);
  }
}

void warp_cpu(const Tensor& images, const Tensor& index, const Tensor& boxes, const Tensor& resized,
              const Tensor& turns, const Tensor& scale, const Tensor& shift,
              const std::optional<Tensor>& colours, Tensor out) {
  const Source source = check_images(images);
  const int64_t channels = source.channels == 1 ? 1 : 3;
  check(out.dim() == 4 && out.size(1) == channels && out.size(2) >= 1 && out.size(3) >= 1 &&
            is_channels_last(out),
        op, ": expected out of shape [B, ", channels, ", h, w], dense in channels_last, got shape ",
        shape(out));
  check(out.scalar_type() == ScalarType::Float || out.scalar_type() == ScalarType::BFloat16, op,
        ": expected out of float32 or bfloat16, got ",
        torch::headeronly::toString(out.scalar_type()));
  const int64_t batch = out.size(0);
  check_table("index", index, ScalarType::Long, {batch});
  check_table("boxes", boxes, ScalarType::Double, {batch, 4});
  check_table("resized", resized, ScalarType::Long, {batch, 2});
  check_table("turns", turns, ScalarType::Double, {batch, 2, 3});
  check_table("scale", scale, ScalarType::Float, {channels});
  check_table("shift", shift, ScalarType::Float, {channels});
  if (colours) {
    check(channels == 3, op, ": expected colours for images in colour only, got ", source.channels,
          " channel");
    check_table("colours", *colours, ScalarType::Float, {batch, 3, 4});
  }

  WarpParams common{};
  common.scale = scale.const_data_ptr<float>();
  common.shift = shift.const_data_ptr<float>();
  common.out_rows = out.size(2);
  common.out_columns = out.size(3);
  common.dtype = out.scalar_type() == ScalarType::Float ? DType::float32 : DType::bfloat16;

  const uint8_t* pixels = images.const_data_ptr<uint8_t>();
  const int64_t* indices = index.const_data_ptr<int64_t>();
  const double* corners = boxes.const_data_ptr<double>();
  const int64_t* sizes = resized.const_data_ptr<int64_t>();
  const double* matrices = turns.const_data_ptr<double>();
  const auto request = [&](int64_t i) {
    const double* b = corners + 4 * i;
    return Request{pixels + indices[i] * source.image_stride,
                   {b[0], b[1], b[2], b[3]},
                   sizes[2 * i],
                   sizes[2 * i + 1],
                   matrices + 6 * i};
  };
  for (int64_t i = 0; i < batch; ++i) {
    check(indices[i] >= 0 && indices[i] < images.size(0), op, ": expected index in 0..",
          images.size(0) - 1, ", got ", indices[i]);
    check_request(request(i), i, common);
  }
  if (batch == 0) return;

  const float* matrix = colours ? colours->const_data_ptr<float>() : nullptr;
  auto* results = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t values = channels * common.out_rows * common.out_columns;
  const int64_t bytes = values * (common.dtype == DType::float32 ? 4 : 2);
  const KernelTable& table = kernels();
  Partition(batch, values).parallel([&](int64_t, int64_t begin, int64_t end) {
    static thread_local Planner planner;
    WarpParams p = common;
    for (int64_t i = begin; i < end; ++i) {
      planner.plan(source, request(i), p);
      p.colour = matrix ? matrix + 12 * i : nullptr;
      p.out = results + i * bytes;
      table.warp(p);
    }
  });
}

}  // namespace
}  // namespace fastresnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fastresnet, CPU, m) {
  m.impl("warp", TORCH_BOX(&fastresnet::cpu::warp_cpu));
}
