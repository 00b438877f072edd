// SPDX-License-Identifier: Apache-2.0
// The functions that every ISA level provides, on plain pointers. isa.cpp chooses one table for the
// process. Also everything that the levels' code needs from the standard library and from torch,
// included here because it must come before a target pragma (see target.h).
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/avg_pool_params.h"
#include "cpu/conv_params.h"
#include "cpu/max_pool_params.h"
#include "cpu/warp_params.h"
#include "params.h"

namespace fastresnet::cpu {

struct KernelTable {
  // Mean and centred sum of squares of rows [begin, end), for each channel.
  // scratch: 3 * channels floats; mean, m2: [channels].
  void (*bn_moments)(const void* x, DType dtype, int64_t channels, int64_t begin, int64_t end,
                     float* scratch, double* mean, double* m2);

  void (*bn_forward)(const BnForwardParams& p, int64_t begin, int64_t end);

  // Sums over rows [begin, end) of g, g * (x - mean) and, for add_bn_relu, g * (residual -
  // residual_mean), where g is the gradient behind the ReLU.
  // scratch: 3 * channels floats; sums: [3, channels].
  void (*bn_backward_sums)(const BnBackwardParams& p, int64_t begin, int64_t end, float* scratch,
                           double* sums);

  void (*bn_backward)(const BnBackwardParams& p, const BnCoefficients& x,
                      const BnCoefficients& residual, int64_t begin, int64_t end);

  // The largest ConvPlan::tile that may be chosen: 1, 2 or 4.
  int64_t (*conv_largest_tile)(DType dtype);

  // Whether ConvMethod::narrow_groups may be chosen.
  bool (*conv_multiplies_groups)(DType dtype);

  // ConvMethod::image_step, where there is one.
  int64_t (*conv_image_step)(DType dtype);

  // Channels of one staged line, which is 64 bytes.
  int64_t (*conv_line_channels)(int64_t tile, DType dtype);

  // One block of 32 columns of the packed weight: output channels, or input channels for the
  // gradient of x (transposed); and the floats that it takes.
  int64_t (*conv_packed_floats)(const ConvPlan& plan, DType dtype, bool transposed);
  void (*conv_pack)(const ConvWeight& weight, const ConvPlan& plan, DType dtype, bool transposed,
                    int64_t column_block, float* packed);

  // Whether a staged line holds just what lies in memory, channel by channel, so that products can
  // read rows of pixels there, and read none beyond.
  bool (*conv_reads_memory)(DType dtype);

  // Floats that the plan's blocks take when staged. Memory for them begins on a line.
  int64_t (*conv_staged_floats)(const ConvPlan& plan, DType dtype);
  int64_t (*conv_backward_staged_floats)(const ConvPlan& plan, DType dtype);

  // Stages some of the panels (of conv_line_channels) of a block's input. window: memory of the
  // thread's own for a line for each pixel of the plan's window, if it has tiles.
  void (*conv_stage)(const ConvForwardParams& p, const ConvBlock& block, Range panels,
                     float* staged, float* window);

  // Some rows (counted as ConvPlan::outputs does) and blocks of 32 channels of y, from a block of
  // which all is staged and those blocks of the weight, packed; and their moments.
  void (*conv_forward)(const ConvForwardParams& p, const ConvBlock& block, float* staged,
                       const float* weight, Range rows, Range out_blocks,
                       const ConvMoments& moments);

  // Stages some panels: those of the gradient of y first, then those of the input.
  void (*conv_backward_stage)(const ConvBackwardParams& p, const ConvBlock& block, Range panels,
                              float* staged, float* window);

  // Some rows and blocks of channels of dx, from those blocks of the weight, packed transposed.
  // Added to sums [2, channels]: those of dx and of dx * (x - x_mean).
  void (*conv_input_gradient)(const ConvBackwardParams& p, const ConvBlock& block, float* staged,
                              const float* weight, Range rows, Range in_blocks, double* sums);

  // The block's share of the gradient of the weight, or that added to dweight [out_blocks, met,
  // products, 32, 32], with tiles [products, out_blocks, met, 32, 32]; met: some of the blocks of
  // input channels that met_by_output counts.
  void (*conv_weight_gradient)(const ConvBackwardParams& p, const ConvBlock& block, float* staged,
                               Range out_blocks, Range met, bool add, float* dweight);

  // The sum of `count` gradients of a plan with tiles, `stride` floats apart, each `products` times
  // [32, 32], `product_stride` floats apart, as [9, 32, 32].
  void (*conv_weight_taps)(int64_t tile, const float* tiles, int64_t product_stride, int64_t count,
                           int64_t stride, float* taps);

  // Rows [begin, end) of the pooled output, of all images together.
  void (*max_pool_forward)(const MaxPoolForwardParams& p, int64_t begin, int64_t end);

  // Sums over rows [begin, end) of the pooled output of g and g * (x - mean).
  // scratch: 2 * channels floats; sums: [2, channels].
  void (*max_pool_backward_sums)(const MaxPoolBackwardParams& p, int64_t begin, int64_t end,
                                 float* scratch, double* sums);

  // Rows [begin, end) of dx, of all images together.
  void (*max_pool_backward)(const MaxPoolBackwardParams& p, const BnCoefficients& k, int64_t begin,
                            int64_t end);

  // Images [begin, end).
  void (*global_avg_pool)(const AvgPoolParams& p, int64_t begin, int64_t end);
  void (*global_avg_pool_backward)(const AvgPoolBackwardParams& p, int64_t begin, int64_t end);

  // One image.
  void (*warp)(const WarpParams& p);
};

// A level is a file isa_LEVEL.cpp that defines its table.
namespace portable {
extern const KernelTable table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512_bf16 {
extern const KernelTable table;
}
namespace amx {
extern const KernelTable table;
}
#endif

}  // namespace fastresnet::cpu
