// SPDX-License-Identifier: Apache-2.0
// How a convolution is cut up: the grid that its output and input share, phases, taps and blocks.
//
// A convolution of stride s reads the input as s * s phases: the pixels (i * s + a, j * s + b) form
// phase (a, b), and on phases the convolution has stride 1. A tap of the kernel reads the phase at
// a fixed distance from the output's place on the grid, so that forward, gradient of the input and
// gradient of the weight are all products of a matrix of pixels, shifted by that distance.
//
// A block is some rows of the grid of some images. It is staged as a plane of pixels whose rows
// have a pitch of a few more than the grid's width: the zeros at the end of a row are the padding
// on its right and, at the same time, the padding on the left of the next row. In the same way the
// zero rows between two images serve both.
//
// Where Winograd's minimal filtering computes `tile` x `tile` outputs together, the grid is one of
// tiles, without any padding: a tile's lines hold all that its outputs need.
//
// Of few channels most of a line would be zeros. What the kernel reads for an output, a patch of
// the input, may then be the channels of one pixel: the convolution is a 1x1 convolution of
// patches.
//
// Where a 1x1 convolution of stride 1 reads its input as it is, there may be nothing to stage: rows
// of a product are then pixels of memory.
//
// On small maps most taps of most places meet padding. There a plane may hold one place after
// another, each of all images of the block: a place's pixels are multiplied with the taps that meet
// a pixel, and with no others.
#pragma once

#include <algorithm>
#include <compare>
#include <cstdint>
#include <vector>

#include "cpu/range.h"

namespace fastresnet::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct ConvShape {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width, out_channels;
  int64_t kernel_height, kernel_width, stride, padding, dilation;
  int64_t groups;

  int64_t group_width() const { return channels / groups; }
  auto operator<=>(const ConvShape&) const = default;
};

struct Phase {
  int64_t row, column;    // the first pixel's place in the input
  int64_t height, width;  // of the phase
  int64_t first_tap, taps;
};

struct Tap {
  int64_t phase;
  int64_t row, column;  // of the phase, less those of the output
  int64_t weight;       // kernel row * kernel width + kernel column
};

// Which products a convolution is made of.
struct ConvMethod {
  int64_t tile = 1;        // outputs a side that are computed together; 1: no minimal filtering
  int64_t image_step = 0;  // planes hold place after place, each of a multiple of so many images;
                           // 0: image after image
  bool patches = false;    // a pixel is all that the kernel reads for an output
  bool in_place = false;   // pixels are read where they lie, and not staged
  bool narrow_groups = false;  // groups are narrower than a block of channels: each is multiplied
                               // by itself, and not a block with zeros between them
};

// Which of `count` places, outputs or a kernel's rows, meet one of `pixels` pixels at a distance.
inline Range met(int64_t distance, int64_t count, int64_t pixels) {
  const int64_t begin = std::max<int64_t>(0, -distance);
  return {begin, std::max(begin, std::min(count, pixels - distance))};
}

// What part of the grid a block is.
struct ConvBlock {
  int64_t image, images, row, rows;
};

struct ConvPlan {
  ConvShape given;
  ConvShape shape;     // of the products: of patches, or of the given convolution
  int64_t tile;        // as in ConvMethod
  bool patches;        // as in ConvMethod
  bool in_place;       // as in ConvMethod
  bool narrow_groups;  // as in ConvMethod
  std::vector<Phase> phases;
  std::vector<Tap> taps;  // by phase
  int64_t grid_height, grid_width;
  int64_t halo;             // zero (or neighbouring) rows above, below and between images
  int64_t margin;           // zero pixels before and behind a plane
  int64_t pitch;            // pixels from one row of a plane to the next
  int64_t column_pitch;     // and from one column to the next
  bool by_places;           // planes hold place after place
  int64_t images, rows;     // of a block, at most
  int64_t blocks_an_image;  // 1 where a block holds whole images
  int64_t blocks;

  // block_bytes: what the staged pixels of a block may take, if it has more than one row.
  ConvPlan(const ConvShape& given, ConvMethod method, int64_t bytes_a_pixel, int64_t block_bytes,
           int64_t threads);
  static ConvShape shape_of_products(const ConvShape& given, ConvMethod method);

  ConvBlock block(int64_t index) const;

  // Places in a plane, in pixels from its begin.
  int64_t at(int64_t image, int64_t row, const ConvBlock& b) const {
    return margin + (halo + image * (b.rows + halo) + row) * pitch;
  }
  int64_t first_place() const { return margin + halo * pitch; }
  int64_t distance(const Tap& tap) const { return tap.row * pitch + tap.column * column_pitch; }
  int64_t plane_pixels() const {
    return by_places ? rows * pitch : 2 * margin + (halo + images * (rows + halo)) * pitch;
  }
  // Pixels of the block whose products count: from the first image's first to the last's last.
  int64_t span(const ConvBlock& b) const {
    return by_places ? plane_pixels() : (b.images * (b.rows + halo) - halo) * pitch;
  }
  // Pixels of the block's planes up to the last that any tap reads.
  int64_t staged_pixels(const ConvBlock& b) const {
    return by_places ? plane_pixels() : at(b.images, 0, b) + margin + 1;
  }
  // Products of matrices that the convolution is the sum, or the transform, of.
  int64_t products() const {
    return tile > 1 ? (tile + 2) * (tile + 2) : static_cast<int64_t>(taps.size());
  }
  // The pixels under some rows of tiles of an image, and one more around them.
  int64_t window_pitch() const { return grid_width * tile + 2; }
  int64_t window_rows(int64_t grid_rows) const { return grid_rows * tile + 2; }
  // Outputs in some rows of a block, counted through its images; with planes of places, in the
  // first row of each of its images, then the second.
  int64_t outputs(const ConvBlock& b, Range rows) const;
  // Rows and columns of the output at which the tap meets a pixel, and their places' number.
  Range rows_met(const Tap& tap) const;
  Range columns_met(const Tap& tap) const;
  int64_t places_met(const Tap& tap) const {
    return rows_met(tap).size() * columns_met(tap).size();
  }
  // Rows of all products of all blocks, those of padding included.
  int64_t rows_multiplied() const;
};

}  // namespace fastresnet::cpu
