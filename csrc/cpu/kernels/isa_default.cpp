// SPDX-License-Identifier: Apache-2.0
// The default level: any processor.
#include "cpu/kernels/table.h"
#include "cpu/kernels/target.h"
#include "cpu/kernels/vec.h"

namespace fastresnet::cpu::portable {
namespace {

#include "cpu/kernels/vec_portable-inl.h"

#include "cpu/kernels/vec_plain-inl.h"
// The kernels, on this level's Vec.
#include "cpu/kernels/bn_act-inl.h"

#include "cpu/kernels/max_pool-inl.h"

#include "cpu/kernels/tile-inl.h"

#include "cpu/kernels/conv_stage-inl.h"

#include "cpu/kernels/conv_store-inl.h"

#include "cpu/kernels/conv_pack-inl.h"

#include "cpu/kernels/winograd_transform-inl.h"

#include "cpu/kernels/winograd-inl.h"

#include "cpu/kernels/conv-inl.h"

#include "cpu/kernels/pixel-inl.h"

#include "cpu/kernels/warp-inl.h"

}  // namespace
}  // namespace fastresnet::cpu::portable

const fastresnet::cpu::KernelTable fastresnet::cpu::portable::table = {
    bn_moments,           bn_forward,
    bn_backward_sums,     bn_backward,
    conv_largest_tile,    conv_line_channels,
    conv_packed_floats,   conv_pack,
    conv_staged_floats,   conv_backward_staged_floats,
    conv_stage,           conv_forward,
    conv_backward_stage,  conv_input_gradient,
    conv_weight_gradient, conv_weight_taps,
    max_pool_forward,     max_pool_backward_sums,
    max_pool_backward,    warp};
