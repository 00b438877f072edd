// SPDX-License-Identifier: Apache-2.0
// What the entry of warp hands to its kernel: one image's geometry in whole numbers.
#pragma once

#include "params.h"

namespace fastresnet::cpu {

// Positions and steps count pixels in units of 2^-32, from the centre of the first one.
constexpr int kPositionBits = 32;
// Weights of a resize are whole numbers that add up to 2^16: their sums over bytes are exact in
// float, in whatever order a level adds them up.
constexpr int kResizeBits = 16;

// Resized pixels are transposed in squares: memory for them ends with a whole one both ways.
constexpr int64_t kSquare = 16;

// A row or column of the resized crop: a weighted sum of `count` of the source's, from `first`.
struct ResizedLine {
  int64_t first, count;
  int64_t weights;  // where its weights begin in WarpParams::weights
};

// Where the output's pixels lie: that of row y and column x at origin + x * across + y * down.
struct Walk {
  int64_t origin, across, down;
};

// One image. All pixels behind the source are 32 bits wide, red in the lowest byte.
struct WarpParams {
  // The part of the image that is used.
  const uint8_t* source;
  int64_t source_rows, source_columns, source_stride;  // stride in bytes
  int32_t channels;                                    // 1, 3, or 4 of which the last is ignored

  // The resize, or null pointers where there is none.
  const ResizedLine* resized_rows;     // [rows]
  const ResizedLine* resized_columns;  // [columns]
  const float* weights;
  uint32_t* upright;   // [rows, stride]
  uint32_t* sideways;  // [source_columns, kSquare], some rows resized and transposed

  // What is turned: the source's part itself, or the resized crop's.
  int64_t rows, columns, stride;  // stride in pixels; unused where the source itself is turned
  Walk u, v;                      // across the columns, down the rows
  bool whole_pixels;              // every output pixel's centre is on one of these

  const float* colour;  // [3, 4], or null
  const float* scale;   // [1 or 3]
  const float* shift;   // [1 or 3]
  void* out;            // [out_rows, out_columns, 1 or 3]
  int64_t out_rows, out_columns;
  DType dtype;
};

}  // namespace fastresnet::cpu
