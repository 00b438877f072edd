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

#include "cpu/kernels/level-inl.h"

}  // namespace
}  // namespace fastresnet::cpu::avx512_bf16
FASTRESNET_TARGET_END

const fastresnet::cpu::KernelTable fastresnet::cpu::avx512_bf16::table =
    fastresnet::cpu::avx512_bf16::kKernels;
#endif
