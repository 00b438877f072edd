// SPDX-License-Identifier: Apache-2.0
// The avx512_bf16 level: avx512 and AVX512_BF16 (Cooper Lake, Zen 4 and newer).
#if defined(__x86_64__)
#include "cpu/kernels/table.h"
#include "cpu/kernels/target.h"
#include "cpu/kernels/vec.h"

#define FASTRESNET_AVX512_BF16
FASTRESNET_TARGET_BEGIN("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
namespace fastresnet::cpu::avx512_bf16 {
namespace {

#include "cpu/kernels/vec_avx512-inl.h"
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
}  // namespace fastresnet::cpu::avx512_bf16
FASTRESNET_TARGET_END

const fastresnet::cpu::KernelTable fastresnet::cpu::avx512_bf16::table = {
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
#endif
