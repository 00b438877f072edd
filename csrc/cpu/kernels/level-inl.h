// SPDX-License-Identifier: Apache-2.0
// Every kernel of a level, on the level's Vec, and the table of them.

#include "cpu/kernels/row-inl.h"

#include "cpu/kernels/bn_act-inl.h"

#include "cpu/kernels/max_pool-inl.h"

#include "cpu/kernels/tile-inl.h"

#include "cpu/kernels/tile_groups-inl.h"

#if defined(FASTRESNET_AMX)
#include "cpu/kernels/tile_amx-inl.h"
#endif

#include "cpu/kernels/conv_stage-inl.h"

#include "cpu/kernels/conv_patches-inl.h"

#include "cpu/kernels/conv_store-inl.h"

#include "cpu/kernels/conv_pack-inl.h"

#include "cpu/kernels/winograd_transform-inl.h"

#include "cpu/kernels/winograd-inl.h"

#include "cpu/kernels/conv_places-inl.h"

#include "cpu/kernels/conv-inl.h"

#include "cpu/kernels/avg_pool-inl.h"

#include "cpu/kernels/pixel-inl.h"

#include "cpu/kernels/warp-inl.h"

constexpr KernelTable kKernels = {
    .bn_moments = bn_moments,
    .bn_forward = bn_forward,
    .bn_backward_sums = bn_backward_sums,
    .bn_backward = bn_backward,
    .conv_largest_tile = conv_largest_tile,
    .conv_multiplies_groups = conv_multiplies_groups,
    .conv_image_step = conv_image_step,
    .conv_line_channels = conv_line_channels,
    .conv_packed_floats = conv_packed_floats,
    .conv_pack = conv_pack,
    .conv_reads_memory = conv_reads_memory,
    .conv_staged_floats = conv_staged_floats,
    .conv_backward_staged_floats = conv_backward_staged_floats,
    .conv_stage = conv_stage,
    .conv_forward = conv_forward,
    .conv_backward_stage = conv_backward_stage,
    .conv_input_gradient = conv_input_gradient,
    .conv_weight_gradient = conv_weight_gradient,
    .conv_weight_taps = conv_weight_taps,
    .max_pool_forward = max_pool_forward,
    .max_pool_backward_sums = max_pool_backward_sums,
    .max_pool_backward = max_pool_backward,
    .global_avg_pool = global_avg_pool,
    .global_avg_pool_backward = global_avg_pool_backward,
    .warp = warp,
};
