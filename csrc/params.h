// SPDX-License-Identifier: Apache-2.0
// What an operator's entry hands to its kernels: plain pointers and sizes, no torch types.
// x and its like are `rows` rows of `channels` values (channels_last: rows = N * H * W).
#pragma once

#include <cstdint>

namespace fastresnet {

enum class DType : int32_t { float32, bfloat16, float16 };

// What follows the batch norm. Each form has a kernel of its own.
enum class Epilogue : int32_t {
  none,         // bn
  relu,         // relu(bn(x))
  add_relu,     // relu(bn(x) + residual)
  add_bn_relu,  // relu(bn(x) + bn(residual))
};

constexpr bool has_residual(Epilogue e) {
  return e == Epilogue::add_relu || e == Epilogue::add_bn_relu;
}

// Bytes of one row of a gradient mask: one bit a channel.
constexpr int64_t mask_bytes(int64_t channels) { return (channels + 7) / 8; }

// A position in a window, counted row by row, is one byte.
constexpr int64_t kMaxPoolKernel = 15;
// The position where the ReLU lets nothing of a window through.
constexpr uint8_t kNoPosition = 255;

// Square windows; those at the border hang over.
struct PoolShape {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width;
  int64_t kernel, stride, padding;
};

// Averages over whole images.
struct AvgPoolShape {
  int64_t batch, height, width, channels;
};

struct BnForwardParams {
  const void* x;                // [rows, channels]
  const float* scale;           // [channels]
  const float* shift;           // [channels]
  const void* residual;         // [rows, channels], for add_relu and add_bn_relu
  const float* residual_scale;  // [channels], for add_bn_relu
  const float* residual_shift;  // [channels], for add_bn_relu
  void* out;                    // [rows, channels]
  uint8_t* mask;                // [rows, mask_bytes(channels)], for add_relu and add_bn_relu
  bool past_caches;             // out is too large to be found in a cache by whoever reads it next
  int64_t rows, channels;
  DType dtype;
  Epilogue epilogue;
};

// dx = scale * ((g - offset) - slope * (x - mean)); what batch_norm.h makes of the sums.
// In evaluation offset and slope are null: dx = scale * g.
struct BnCoefficients {
  const float* scale;   // [channels]
  const float* offset;  // [channels]
  const float* slope;   // [channels]
};

struct BnBackwardParams {
  const void* grad;            // [rows, channels]
  const void* x;               // [rows, channels]
  const float* mean;           // [channels]
  const float* scale;          // [channels], for relu: the mask is recomputed
  const float* shift;          // [channels], for relu
  const uint8_t* mask;         // [rows, mask_bytes(channels)], for add_relu and add_bn_relu
  const void* residual;        // [rows, channels], for add_bn_relu
  const float* residual_mean;  // [channels], for add_bn_relu
  void* dx;                    // [rows, channels]
  void* dresidual;             // [rows, channels], for add_relu and add_bn_relu
  int64_t rows, channels;
  DType dtype;
  Epilogue epilogue;
};

}  // namespace fastresnet
