// SPDX-License-Identifier: Apache-2.0
// The avx2 level: AVX2, FMA and F16C (Haswell, Zen and newer).
#if defined(__x86_64__)
#include "cpu/kernels/table.h"
#include "cpu/kernels/target.h"
#include "cpu/kernels/vec.h"

FASTRESNET_TARGET_BEGIN("avx2,fma,f16c")
namespace fastresnet::cpu::avx2 {
namespace {

#include "cpu/kernels/vec_avx2-inl.h"

#include "cpu/kernels/level-inl.h"

}  // namespace
}  // namespace fastresnet::cpu::avx2
FASTRESNET_TARGET_END

const fastresnet::cpu::KernelTable fastresnet::cpu::avx2::table = fastresnet::cpu::avx2::kKernels;
#endif
