// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv_plan.h"

#include <algorithm>

namespace fastresnet::cpu {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// All that the kernel reads for an output is one pixel: rows of the kernel, then columns, then
// channels.
ConvShape unfold(ConvShape s) {
  s.channels *= s.kernel_height * s.kernel_width;
  s.height = s.out_height, s.width = s.out_width;
  s.kernel_height = s.kernel_width = s.stride = s.dilation = 1;
  s.padding = 0;
  return s;
}

// A 1x1 convolution of stride 1 knows nothing of rows and images: all pixels form one column.
ConvShape flatten(ConvShape s) {
  if (s.kernel_height == 1 && s.kernel_width == 1 && s.stride == 1 && s.padding == 0) {
    s.height = s.out_height = s.batch * s.height * s.width;
    s.batch = s.width = s.out_width = 1;
  }
  return s;
}

}  // namespace

ConvShape ConvPlan::shape_of_products(const ConvShape& given, ConvMethod method) {
  return flatten(method.patches ? unfold(given) : given);
}

ConvPlan::ConvPlan(const ConvShape& given, ConvMethod method, int64_t bytes_a_pixel,
                   int64_t block_bytes, int64_t threads)
    : given(given),
      shape(shape_of_products(given, method)),
      tile(method.tile),
      patches(method.patches),
      in_place(method.in_place),
      narrow_groups(method.narrow_groups),
      by_places(method.image_step > 0) {
  const ConvShape& s = shape;
  int64_t top = 0, bottom = 0, left = 0, right = 0;
  for (int64_t a = 0; a < s.stride; ++a)
    for (int64_t b = 0; b < s.stride; ++b) {
      Phase phase{a,
                  b,
                  ceil_div(s.height - a, s.stride),
                  ceil_div(s.width - b, s.stride),
                  static_cast<int64_t>(taps.size()),
                  0};
      for (int64_t r = 0; r < s.kernel_height; ++r)
        for (int64_t c = 0; c < s.kernel_width; ++c) {
          const int64_t row = r * s.dilation - s.padding, column = c * s.dilation - s.padding;
          const Tap tap{static_cast<int64_t>(phases.size()), floor_div(row, s.stride),
                        floor_div(column, s.stride), r * s.kernel_width + c};
          if (row - tap.row * s.stride != a || column - tap.column * s.stride != b) continue;
          taps.push_back(tap);
          ++phase.taps;
          top = std::max(top, -tap.row), bottom = std::max(bottom, tap.row);
          left = std::max(left, -tap.column), right = std::max(right, tap.column);
        }
      phases.push_back(phase);
    }
  grid_height = std::max(s.out_height, phases[0].height);
  grid_width = std::max(s.out_width, phases[0].width);
  // The gradient of the input reads that of the output in the opposite direction, hence the
  // larger of both sides.
  halo = std::max(top, bottom);
  margin = std::max(left, right);
  if (tile > 1) {
    grid_height = ceil_div(grid_height, tile), grid_width = ceil_div(grid_width, tile);
    halo = margin = 0;
  }
  pitch = grid_width + margin;
  column_pitch = 1;

  if (by_places) {
    rows = grid_height, blocks_an_image = 1, halo = margin = 0;
    const int64_t fitting = block_bytes / (grid_height * grid_width * bytes_a_pixel);
    images = std::clamp<int64_t>(fitting, 1, std::max<int64_t>(1, s.batch / threads));
    if (images > method.image_step) images -= images % method.image_step;
    blocks = ceil_div(s.batch, images);
    column_pitch = round_up(images, method.image_step);
    pitch = grid_width * column_pitch;
    return;
  }

  const int64_t row_bytes = pitch * bytes_a_pixel;
  rows = std::clamp<int64_t>(block_bytes / row_bytes - 2 * halo, 1, grid_height);
  // As many blocks for every thread, and rows spread evenly over them.
  int64_t wanted = std::max(ceil_div(grid_height, rows), ceil_div(threads, s.batch));
  if (wanted > 1 && s.batch % threads != 0) wanted = round_up(wanted, threads);
  rows = ceil_div(grid_height, std::min(wanted, grid_height));
  blocks_an_image = ceil_div(grid_height, rows);
  images = 1;
  if (blocks_an_image == 1) {
    const int64_t fitting = std::max<int64_t>(1, block_bytes / (row_bytes * (rows + halo)));
    images = ceil_div(s.batch, round_up(ceil_div(s.batch, fitting), threads));
  }
  blocks = blocks_an_image == 1 ? ceil_div(s.batch, images) : s.batch * blocks_an_image;
}

ConvBlock ConvPlan::block(int64_t index) const {
  if (blocks_an_image == 1) {
    const int64_t image = index * images;
    return {image, std::min(images, shape.batch - image), 0, grid_height};
  }
  const int64_t row = index % blocks_an_image * rows;
  return {index / blocks_an_image, 1, row, std::min(rows, grid_height - row)};
}

int64_t ConvPlan::outputs(const ConvBlock& b, Range rows) const {
  if (by_places) {
    const int64_t all = shape.out_height * b.images;
    return (std::min(rows.end, all) - std::min(rows.begin, all)) * shape.out_width;
  }
  const int64_t of_image = std::clamp<int64_t>(shape.out_height - b.row * tile, 0, b.rows * tile);
  const auto before = [&](int64_t row) {
    return row / b.rows * of_image + std::min(row % b.rows * tile, of_image);
  };
  return (before(rows.end) - before(rows.begin)) * shape.out_width;
}

Range ConvPlan::rows_met(const Tap& tap) const {
  return met(tap.row, shape.out_height, phases[tap.phase].height);
}

Range ConvPlan::columns_met(const Tap& tap) const {
  return met(tap.column, shape.out_width, phases[tap.phase].width);
}

int64_t ConvPlan::rows_multiplied() const {
  if (!by_places) return products() * shape.batch * grid_height * pitch;
  int64_t places = 0;
  for (const Tap& tap : taps) places += places_met(tap);
  return places * blocks * column_pitch;
}

}  // namespace fastresnet::cpu
