// SPDX-License-Identifier: Apache-2.0
// The avx512 level: F, BW, DQ and VL (Skylake-X and newer).
#if defined(__x86_64__)
#include "cpu/kernels/table.h"
#include "cpu/kernels/target.h"
#include "cpu/kernels/vec.h"

FASTRESNET_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
namespace fastresnet::cpu::avx512 {
namespace {

#include "cpu/kernels/vec_avx512-inl.h"

#include "cpu/kernels/level-inl.h"

}  // namespace
}  // namespace fastresnet::cpu::avx512
FASTRESNET_TARGET_END

const fastresnet::cpu::KernelTable fastresnet::cpu::avx512::table =
    fastresnet::cpu::avx512::kKernels;
#endif
